"""The walls of the house: who may import whom, how long a file or a function may be, and what training loads."""

import ast
import io
import subprocess
import sys
import tokenize

import pytest
from tiny import ENV, ROOT

# A module, or a folder's modules with a star -> what it may import of ours, by the same names.
LEAVES = {"core.errors", "core.start", "core.streams", "core.files", "core.additions"}
ENCODINGS = {"core.encoding", "core.specs", "posenc", "zoo.*"}
PLACES = {"core.place", "core.report"}
MODEL = LEAVES | ENCODINGS | PLACES | {"core.attention", "core.cache", "core.norms", "model"}
SETTINGS = MODEL | {"core.flags", "core.settings", "core.optimizers"}
RUNS = SETTINGS | {"core.stop", "data", "data.*", "core.checkpoints", "core.runs", "core.log", "core.measure"}
MAY_IMPORT = {
    "core.streams": set(),
    "core.errors": {"core.streams"},
    "core.start": set(),
    "core.additions": set(),
    "core.files": set(),
    "core.flags": {"core.errors"},
    "core.encoding": {"core.errors"},
    "core.specs": {"core.encoding", "core.errors", "core.additions"},
    "posenc": {"core.encoding", "core.specs"},
    "zoo": set(),
    "zoo.*": ENCODINGS,
    "core.place": {"core.errors"},
    "core.stop": set(),
    "core.report": {"core.errors", "core.files"},
    "core.optimizers": {"core.errors"},
    "core.attention": {"core.place", "core.encoding"},
    "core.norms": set(),
    "core.cache": {"core.attention", "core.place", "core.encoding", "core.errors", "core.additions"},
    "model": {"posenc", "core.attention", "core.cache", "core.norms", "core.errors", "core.additions"},
    "core.settings": {"model", "posenc", "core.flags", "core.errors"},
    "data": {"data.*", "core.errors", "core.files", "core.flags"},  # never the model
    "data.*": {"data", "data.*", "core.errors", "core.files", "core.flags"},
    "core.checkpoints": SETTINGS,  # never the data: a checkpoint is read before its tokenizer is known
    "core.runs": RUNS,
    "core.log": RUNS,
    "core.measure": RUNS,
    "train": RUNS,
    "sample": RUNS,
    "lab": set(),
    "lab.*": RUNS | {"train", "sample", "lab.*"},
    "hub": set(),
    "hub.*": RUNS | {"train", "sample", "hub.*"},
    "evaluate": RUNS | {"train", "sample", "lab.*"},
    "compare": RUNS | {"train", "sample", "lab.*"},
}
# The edges that lead upwards, and where each stands: in a function, which needs it late if at all, or in the last line.
UPWARD = {
    ("posenc", "zoo"): "last line",  # the chapters register themselves, and import posenc's classes
    ("core.runs", "hub"): "function",  # a run named hf:... is a published model
    ("train", "evaluate"): "function",  # the table that closes a run
}
FILE, FUNCTION, PARAMETERS = 260, 40, 7  # code lines of a file and of a function; its positional parameters
EVENING = 1700  # code lines of the files that the README gives an order of reading for
# What is larger than that: its name -> why it has to be.
LARGER = {}


def sources():
    """{module: its file} of all that is tracked or about to be, without tests and configs."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout.split()
    files = [ROOT / name for name in names if not name.startswith(("tests/", "configs/")) and (ROOT / name).exists()]
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {".".join(part for part in parts[file] if part != "__init__"): file for file in files}


SOURCES = sources()
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in SOURCES.items()}


def belongs(module, names):
    """Whether a module is one of the names, of which `folder.*` stands for all modules below a folder."""
    folders = [module.rsplit(".", count)[0] + ".*" for count in range(1, module.count(".") + 1)]
    return bool({module, *folders} & set(names))


def imports(module):
    """(module of ours, node, "module", "function" or "last line") for every import of a module."""
    tree = TREES[module]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else node.module for name in inner]
        else:
            continue
        where = "function" if id(node) in inside else "last line" if node is tree.body[-1] else "module"
        yield from ((name, node, where) for name in names if name in SOURCES)


def is_main(node):
    """Whether a statement is `if __name__ == "__main__": ...`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def allowed(module):
    """What a module may import: by its own name, or by that of the nearest folder with a star."""
    folders = [module.rsplit(".", count)[0] + ".*" for count in range(1, module.count(".") + 1)]
    return next(MAY_IMPORT[name] for name in (module, *folders) if name in MAY_IMPORT)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_the_house(module):
    for name, node, where in imports(module):
        upward = [place for (upper, below), place in UPWARD.items()
                  if module == upper and belongs(name, {below, f"{below}.*"})]  # fmt: skip
        if not belongs(name, allowed(module)):
            assert where in upward, f"{SOURCES[module]}:{node.lineno} imports {name}"


def test_every_upward_edge_is_there():
    """An exception that nobody needs any more is taken off the list."""
    for (module, below), place in UPWARD.items():
        found = {where for name, _, where in imports(module) if belongs(name, {below, f"{below}.*"})}
        assert found == {place}, (module, below)


def test_the_chapters_of_the_zoo_make_no_circle():
    chapters = {module for module in SOURCES if module.startswith("zoo.")}
    below = {module: {name for name, _, _ in imports(module)} & chapters for module in chapters}
    while below:
        free = [module for module, names in below.items() if not names & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        for module in free:
            del below[module]


def code_lines(text, tree):
    """The numbers of the lines that hold code: no blank ones, comments or docstrings."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return code


@pytest.mark.parametrize("module", SOURCES)
def test_files_functions_and_parameters_keep_their_budgets(module):
    tree, large = TREES[module], {}
    code = code_lines(SOURCES[module].read_text(encoding="utf-8"), tree)
    if len(code) > FILE:
        large[module] = f"{len(code)} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = len([line for line in code if node.lineno <= line <= node.end_lineno])
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count = len([name for name in names if name not in ("self", "cls")])
            if lines > FUNCTION or count > PARAMETERS:
                large[f"{module}.{node.name}"] = f"{lines} lines, {count} parameters"
    own = {name for name in LARGER if module in (name, name.rpartition(".")[0])}
    assert large.keys() == own & large.keys() and own <= large.keys(), large


def test_training_loads_no_laboratory_no_hub_and_no_library_of_theirs():
    strangers = ("lab", "hub", "matplotlib", "transformers", "safetensors", "tokenizers")
    said = subprocess.run(
        [sys.executable, "-c", "import sys, train; print(*sys.modules)"],
        cwd=ROOT, env=ENV, capture_output=True, encoding="utf-8", check=True,
    ).stdout.split()  # fmt: skip
    assert not {name.partition(".")[0] for name in said} & set(strangers)


def test_a_file_that_is_run_by_its_path_finds_the_package_core():
    """`python lab/gallery.py` looks beside gallery.py first, and `python -m lab.gallery` never does."""
    commands = [SOURCES[module] for module, tree in TREES.items() if any(map(is_main, tree.body))]
    folders = {file.parent for file in commands} - {ROOT}
    assert folders >= {ROOT / "lab", ROOT / "lab" / "bench", ROOT / "hub", ROOT / "data"}
    code = "import sys; sys.path[0] = sys.argv[1]; import core.start, core.errors as found; print(found.__file__)"
    for folder in folders:
        words = [sys.executable, "-c", code, str(folder)]
        said = subprocess.run(words, cwd=folder, env=ENV, capture_output=True, encoding="utf-8", check=True).stdout
        assert said.strip() == str(ROOT / "core" / "errors.py"), folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["train.py", "lab/gallery.py", "lab/bench", "lab/bench/race.py", "hub/export.py", "data/bpe.py"]
)
def test_a_command_runs_by_its_path_from_anywhere(file, tmp_path):
    words = [sys.executable, ROOT / file, "--help"]
    done = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: python ")


def test_the_evening():
    """What somebody reads who wants to know how training, sampling and positions work."""
    core = ("encoding", "attention", "cache", "measure", "optimizers")
    evening = ["train", "sample", "model", "posenc", *(f"core.{name}" for name in core)]
    assert set(evening) <= SOURCES.keys()
    assert (
        sum(len(code_lines(SOURCES[module].read_text(encoding="utf-8"), TREES[module])) for module in evening)
        <= EVENING
    )


def test_the_data_know_no_model():
    """Not through others either."""
    seen, ahead = set(), [module for module in SOURCES if module == "data" or module.startswith("data.")]
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += [name for name, _, _ in imports(module)]
    assert not seen & {"model", "posenc", "core.attention", "core.cache"}


def says_utf8(call):
    """Whether a call names the encoding, if it opens a text file or exchanges text with a process."""
    function, named = call.func, {keyword.arg: keyword.value for keyword in call.keywords}  # None: behind **
    name = getattr(function, "id", getattr(function, "attr", ""))
    if {"encoding", None} & named.keys():
        return True
    if name in ("run", "Popen", "check_output") and ast.unparse(function).startswith("subprocess."):
        return not {"text", "universal_newlines"} & named.keys()
    if name in ("read_text", "write_text"):
        return len(call.args) > (name == "write_text")
    if name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile"):
        return "mode" not in named
    if name not in ("open", "fdopen") or ast.unparse(function) in ("os.open", "Image.open"):
        return True
    place = 0 if isinstance(function, ast.Attribute) and name == "open" else 1  # of the mode: Path.open has no path
    mode = named.get("mode", call.args[place] if len(call.args) > place else ast.Constant("r"))
    return not isinstance(mode, ast.Constant) or "b" in mode.value


def test_every_text_file_is_utf8_whatever_the_locale():
    """On Windows, and under LC_ALL=C, open() means another encoding by itself."""
    bad = "open(f); open(f, 'w'); f.open(); f.read_text(); f.write_text(t); subprocess.run(w, text=True)"
    assert not any(says_utf8(node) for node in ast.walk(ast.parse(bad)) if isinstance(node, ast.Call))
    good = (
        "open(f, 'rb'); f.open('wb'); f.read_text('utf-8'); subprocess.run(w); open(f, encoding='utf-8'); os.open(f, 1)"
    )
    assert all(says_utf8(node) for node in ast.walk(ast.parse(good)) if isinstance(node, ast.Call))
    for file in (*SOURCES.values(), *(ROOT / "tests").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Call) or says_utf8(node), f"{file}:{node.lineno}: {ast.unparse(node)}"
