"""Downloads: what broke off goes on, from a server that knows ranges or not; nothing but the right file is kept."""

import hashlib
import http.server
import multiprocessing
import re
import socket
import threading

import pytest

from core import files
from core.errors import UserError
from data import download

BODY = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY, or `server.body`. `server.cuts`: after how many bytes to cut the connection, request by request."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if begin >= len(server.body):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(server.body) - 1}/{len(server.body)}")
        self.send_header("Content-Length", str(len(server.body) - begin))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(server.body[begin:][:cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.asked, server.cuts, server.ranges = BODY, [], [], True
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def place(tmp_path):
    return tmp_path / "raw" / "file"


def part_of(place):
    return place.with_name("file.part")


def fetched(server, place):
    assert download.fetch(server.url, place, SHA256) == place
    return place.read_bytes() == BODY and beside(place) == [place]


def beside(place):
    """What lies in the folder, but for its lock."""
    return [file for file in place.parent.iterdir() if file.name != download.LOCK]


def failure(server, place):
    with pytest.raises(UserError) as error:
        download.fetch(server.url, place, SHA256)
    said = str(error.value)
    assert server.url in said and str(place) in said and "\n" not in said and not place.exists()
    return said


def test_a_broken_connection_is_taken_up_by_the_same_command(server, place):
    server.cuts = [100_000, 50_000, 1]
    for size in (100_000, 150_000, 150_001):
        said = failure(server, place)
        assert "goes on" in said and f"{size:,} of 512,000" in said
        assert part_of(place).read_bytes() == BODY[:size]
    assert fetched(server, place)
    assert server.asked == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]


def test_a_server_without_ranges_begins_anew(server, place):
    server.cuts, server.ranges = [100_000], False
    failure(server, place)
    assert fetched(server, place)
    assert server.asked == [None, "bytes=100000-"]


@pytest.mark.parametrize("size", [len(BODY), len(BODY) + 5])
def test_a_part_that_reaches_the_end_or_past_it_is_fetched_anew(server, place, size):
    place.parent.mkdir()
    part_of(place).write_bytes((BODY + b"and more")[:size])
    assert fetched(server, place) and server.asked == [f"bytes={size}-", None]


@pytest.mark.parametrize("begin", [b"", b"another file"])
def test_what_fails_the_checksum_is_removed_and_the_next_call_begins_anew(server, place, begin):
    place.parent.mkdir()
    part_of(place).write_bytes(begin)
    server.body = BODY if begin else BODY[::-1]
    assert "SHA-256" in failure(server, place)
    assert beside(place) == []
    server.body = BODY
    assert fetched(server, place) and server.asked[-1] is None


def test_offline_fails_and_keeps_what_came_before(server, place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    assert "refused" in failure(server, place) and beside(place) == []
    part_of(place).write_bytes(BODY[:10])
    assert "refused" in failure(server, place) and part_of(place).read_bytes() == BODY[:10]


def test_the_bar_begins_where_the_part_ends(server, place, monkeypatch):
    bars, tqdm = [], download.tqdm
    monkeypatch.setattr(download, "tqdm", lambda **said: bars.append((said["initial"], said["total"])) or tqdm(**said))
    server.cuts = [100_000]
    failure(server, place)
    assert fetched(server, place)
    assert bars == [(0, len(BODY)), (100_000, len(BODY))]


def test_another_process_waits_and_takes_what_came(server, place):
    place.parent.mkdir()
    lock = files.lock(place.parent / download.LOCK)
    process = multiprocessing.get_context("spawn").Process(target=download.fetch, args=(server.url, str(place), SHA256))
    process.start()
    process.join(2)
    assert process.is_alive() and server.asked == []
    place.write_bytes(BODY)
    lock.release()
    process.join(30)
    assert process.exitcode == 0 and server.asked == [] and beside(place) == [place]
