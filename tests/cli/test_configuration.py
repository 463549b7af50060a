"""Where the values of options come from, as `pdengine config` tells it, and what is refused."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from pdengine.cli.config_file import OF_KUBERNETES, TABLES, option_tables
from pdengine.cli.main import main
from pdengine.cli.serve import worker_config
from pdengine.engine.worker_config import StartupError
from pdengine.models.demo.facts import checkpoint_directory

ALL_TABLES = option_tables(main)
OPTIONS_OF_COMMANDS = [
    (command, table, key)
    for command, tables in TABLES.items()
    for table in tables
    for key, option in ALL_TABLES[table].items()
    if option.name in {parameter.name for parameter in main.commands[command].params}
]


def run(*arguments: str, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, arguments, env=environment)


def rows(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """What `pdengine config` prints: option -> (value, origin), in the last section that has it."""
    result = run("config", *arguments, environment=environment)
    assert result.exit_code == 0, result.output
    lines = [re.split(r" {2,}", line.strip()) for line in result.output.splitlines() if line.startswith("  ")]
    return {option: (value, origin) for option, value, origin in lines}


def refusal(content: str, tmp_path: Path) -> str:
    """The one sentence with which a file of this content is refused, without the path."""
    path = tmp_path / "pdengine.toml"
    path.write_text(content)
    result = run("config", "prefill", "--config", str(path))
    assert result.exit_code == 1, result.output
    [line] = result.output.splitlines()
    assert line.startswith(f"Error: {path}: ")
    return line.removeprefix(f"Error: {path}: ")


def sample(option: click.Option) -> str | float:
    """A value that the option takes and that is not its default."""
    if isinstance(option.type, click.types.BoolParamType):
        return True
    if isinstance(option.type, click.types.FloatParamType):
        return 0.7 if option.name == "gpu_memory_utilization" else 7.5
    if isinstance(option.type, click.types.IntParamType):
        return 7
    if isinstance(option.type, click.Choice):
        return next(str(choice) for choice in option.type.choices if choice != option.default)
    return "7%" if option.name == "kv_memory" else "some-text"


def toml(table: str, key: str, value: str | float) -> str:
    quoted = str(value).lower() if isinstance(value, int | float) else f'"{value}"'
    return f"[{table}]\n{key} = {quoted}\n" if table else f"{key} = {quoted}\n"


@pytest.mark.parametrize(("command", "table", "key"), OPTIONS_OF_COMMANDS)
def test_every_option_is_read_from_the_environment_and_the_file(
    command: str, table: str, key: str, tmp_path: Path
) -> None:
    option = ALL_TABLES[table][key]
    value = sample(option)
    name = str(option.envvar)
    assert rows(command, environment={name: str(value)})[f"--{key}"] == (str(value), f"environment {name}")
    path = tmp_path / "f.toml"
    path.write_text(toml(table, key, value))
    place = f"[{table}]" if table else "top level"
    expected = (str(value), f"{path} {place}")
    assert rows(command, "--config", str(path))[f"--{key}"] == expected
    assert rows(command, environment={"PDENGINE_CONFIG": str(path)})[f"--{key}"] == expected


SOURCES = ("command line", "environment PDENGINE_MAX_REQUESTS", "[decode]", "[worker]")


@pytest.mark.parametrize(
    "given", [set(s) for n in range(5) for s in itertools.combinations(SOURCES, n)], ids=str
)
def test_the_first_source_that_has_a_value_wins(given: set[str], tmp_path: Path) -> None:
    values = {source: str(101 + index) for index, source in enumerate(SOURCES)}
    path = tmp_path / "f.toml"
    path.write_text("".join(f"{t}\nmax-requests = {values[t]}\n" for t in SOURCES[2:] if t in given))
    arguments = ["--max-requests", values[SOURCES[0]]] if SOURCES[0] in given else []
    environment = {"PDENGINE_MAX_REQUESTS": values[SOURCES[1]]} if SOURCES[1] in given else {}
    value, origin = rows("decode", "--config", str(path), *arguments, environment=environment)[
        "--max-requests"
    ]
    winner = next((source for source in SOURCES if source in given), None)
    assert value == ("64" if winner is None else values[winner])
    assert origin == ("default" if winner is None else winner if winner[0] != "[" else f"{path} {winner}")


def test_an_empty_environment_variable_is_none() -> None:
    assert rows("decode", environment={"PDENGINE_DTYPE": ""})["--dtype"] == ("-", "default")


def test_workers_of_up_read_their_own_tables(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(
        "[worker]\nmax-requests = 8\nblock-size = 8\n[decode]\nmax-requests = 256\n[up]\nunified = 1\n"
    )
    result = run("config", "up", "--config", str(path), "--block-size", "32")
    sections = dict(section.split("\n", 1) for section in result.output.split("\n\n"))
    assert list(sections) == [
        "pdengine up",
        "pdengine up, each of 1 prefill",
        "pdengine up, each of 1 decode",
        "pdengine up, each of 1 unified",
    ]
    for title, section in sections.items():
        if title != "pdengine up":
            assert re.search(r"--block-size +32 +command line", section)
            requests = 256 if "decode" in title else 8
            assert re.search(rf"--max-requests +{requests} ", section)


@pytest.fixture
def told_by_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], list[str]]]:
    """f(options) -> what `up` with these options tells its router and its decode worker; neither is begun."""
    told: list[tuple[list[str], list[str]]] = []

    def no_cluster(
        *_: object, router_arguments: list[str], worker_arguments: dict[str, list[str]], **__: object
    ) -> None:
        told.append((router_arguments, worker_arguments["decode"]))
        raise StartupError("that is all")

    def tell(*options: str) -> tuple[list[str], list[str]]:
        result = run("up", "--model", str(checkpoint_directory()), "--kv-memory", "16MiB", *options)
        assert "that is all" in result.output
        return told.pop()

    monkeypatch.setattr("pdengine.cli.up.Cluster.__init__", no_cluster)
    return tell


def test_up_tells_its_router_how_much_a_decode_worker_may_compute(
    tmp_path: Path, told_by_up: Callable[..., tuple[list[str], list[str]]]
) -> None:
    path = tmp_path / "f.toml"
    path.write_text("[router]\nlocal-prefill-tokens = 5\n")
    told = [
        told_by_up(*more)[0]
        for more in ([], ["--config", str(path)], ["--config", str(path), "--local-prefill-tokens", "7"])
    ]
    assert told == [["--local-prefill-tokens", value] for value in ("256", "5", "7")]


def test_up_tells_its_router_alone_to_be_insecure(
    told_by_up: Callable[..., tuple[list[str], list[str]]],
) -> None:
    """Its workers stay on loopback."""
    of_router, of_worker = told_by_up("--insecure", "--metrics-address", "9100")
    assert of_router == ["--local-prefill-tokens", "256", "--insecure"]
    assert "--insecure" not in of_worker
    assert of_worker[of_worker.index("--metrics-address") + 1] == "9100"


def test_the_metrics_of_the_router_are_not_those_of_the_workers(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[router]\nmetrics-address = "9000"\n[worker]\nmetrics-address = "9100"\n')
    for command, address in (("router", "9000"), ("decode", "9100"), ("up", "9100")):
        assert rows(command, "--config", str(path))["--metrics-address"][0] == address
    environment = {"PDENGINE_METRICS_ADDRESS": "9100"}
    assert rows("router", environment=environment)["--metrics-address"] == ("-", "default")


def test_config_without_a_command_shows_all(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('model = "some/model"\n')
    result = run("config", "--config", str(path))
    titles = [line for line in result.output.splitlines() if line.startswith("pdengine ")]
    assert titles[:6] == [f"pdengine {name}" for name in TABLES]
    assert len(re.findall(rf"--model +some/model +{path} top level", result.output)) == 6
    assert rows("prefill")["--model"] == ("-", "not set, but required")
    assert "'serve' is not one of router, http, prefill" in run("config", "serve").output


def test_columns_are_aligned() -> None:
    lines = [line for line in run("config", "up").output.splitlines() if line.startswith("  ")]
    assert len({line.rindex("  ") for line in lines if line.endswith("  default")}) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[worker]\nkv_memory = '1GiB'", "[worker] has no option kv_memory; did you mean kv-memory?"),
        ("[decode]\nmax-request = 3", "[decode] has no option max-request; did you mean max-requests?"),
        ("modell = 'a'", "top level has no option modell; did you mean model?"),
        ("[wroker]\nblock-size = 3", "there is no table [wroker]; did you mean [worker]?"),
        ("[xyz]\nblock-size = 3", "there is no table [xyz]"),
        ("[worker]\nzzz = 3", "[worker] has no option zzz"),
        ("kv-memory = '1GiB'", "top level has no option kv-memory; its place is [worker]"),
        ("[up]\nkv-memory = '1GiB'", "[up] has no option kv-memory; its place is [worker]"),
        ("[prefill]\nmodel = 'a'", "[prefill] has no option model; its place is top level"),
        ("[worker]\nconfig = 'a'", "[worker] has no option config"),
        ("router = 'tcp://1.2.3.4:5'", "router must be a table, found 'tcp://1.2.3.4:5'"),
        ("[worker]\nmax-requests = '3'", "[worker] max-requests must be an integer, found '3'"),
        ("[worker]\nmax-requests = 3.0", "[worker] max-requests must be an integer, found 3.0"),
        ("[worker]\nmax-requests = true", "[worker] max-requests must be an integer, found True"),
        ("[worker]\nkv-memory = 3", "[worker] kv-memory must be a string, found 3"),
        ("[worker]\ndtype = ['a']", "[worker] dtype must be a string, found ['a']"),
        ("[up]\nprefill = -1", "[up] prefill: -1 is not in the range x>=0."),
    ],
)
def test_what_no_option_would_read_is_refused(content: str, message: str, tmp_path: Path) -> None:
    assert refusal(content, tmp_path) == message


def test_a_value_that_an_option_does_not_take_is_refused_with_its_place(tmp_path: Path) -> None:
    sentence = refusal("[decode]\nkv-memory = '4 potatoes'", tmp_path)
    assert sentence.startswith("[decode] kv-memory: '4 potatoes' is not a size")


def test_a_file_that_is_no_toml_is_refused_with_the_line(tmp_path: Path) -> None:
    assert "not valid TOML" in refusal("[worker\n", tmp_path)
    assert "line 2" in refusal("a = 1\nb = = 2", tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    result = run("config", "up", "--config", str(tmp_path / "binary.toml"))
    assert "binary.toml: not valid TOML" in result.output
    assert result.exit_code == 1


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.toml", tmp_path):
        result = run("config", "up", environment={"PDENGINE_CONFIG": str(path)})
        assert result.exit_code == 1
        assert f"Error: {path}: cannot be read" in result.output


def test_an_unknown_environment_variable_is_refused_with_the_nearest_name() -> None:
    result = run("config", "decode", environment={"PDENGINE_KVMEMORY": "1GiB"})
    assert result.exit_code == 1
    assert "PDENGINE_KVMEMORY is not known; did you mean PDENGINE_KV_MEMORY?" in result.output


@pytest.mark.parametrize(
    "name",
    [
        "PDENGINE_UCX_LIB",
        "PDENGINE_ROUTER_SERVICE_HOST",
        "PDENGINE_ROUTER_SERVICE_PORT_HTTP",
        "PDENGINE_ROUTER_PORT",
        "PDENGINE_ROUTER_PORT_5556_TCP_ADDR",
        "PDENGINE_PORT",
    ],
)
def test_variables_that_others_set_are_left_alone(name: str) -> None:
    assert rows("decode", environment={name: "x"}) == rows("decode")


def test_no_option_has_a_name_that_kubernetes_uses() -> None:
    names = {str(option.envvar) for table in ALL_TABLES.values() for option in table.values()}
    assert not {name for name in names if OF_KUBERNETES.search(name)}
    assert len(names) == len({(o.opts[0], o.name) for table in ALL_TABLES.values() for o in table.values()})


def test_a_bad_value_in_the_environment_names_the_variable() -> None:
    result = run("config", "decode", environment={"PDENGINE_MAX_REQUESTS": "many"})
    assert result.exit_code == 2
    assert "env var: 'PDENGINE_MAX_REQUESTS'" in result.output


def test_an_empty_revision_overrides_the_one_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is how `up` hands its workers the directory that it has resolved."""
    monkeypatch.setenv("PDENGINE_REVISION", "main")
    arguments = ["--model", str(checkpoint_directory()), "--revision", "", "--router", "tcp://127.0.0.1:9"]
    with click.Context(main) as root, main.commands["decode"].make_context("decode", arguments, root) as ctx:
        config = worker_config("decode", **ctx.params)
    assert config.model_directory == checkpoint_directory()
    assert config.kv_memory is None
