"""Which study is loaded, and what a faulty one says: file, line, key, found, fix."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.errors import ConfigError
from taprobe_core.study import Study, load_study, parse_study, shipped_studies
from taprobe_core.study import source as source_module

TINY = """\
name: tiny
rollouts:
  source:
    kind: policy
models:
  a:
    rollouts_dir: a
    n_layers: 4
    layers: all
    checkpoint:
      kind: stand_in
      architecture: qwen2
settings: [good]
seeds: [0, 1]
"""

NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0o?[0-7]+|0x[0-9a-fA-F]+")
"""A number in YAML 1.2."""


def faults_of(text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_study(text, "s.yaml", environ=environ)
    message = str(caught.value)
    assert "s.yaml" in message
    assert "\nFix: " in message
    return message


def outcome_of(text: str) -> Study | ConfigError:
    try:
        return parse_study(text, "s.yaml", environ={})
    except ConfigError as error:
        return error


def edited(old: str, new: str) -> str:
    assert old in TINY
    return TINY.replace(old, new)


class TestWhichStudy:
    def test_a_path_a_variable_and_the_default(self, tmp_path: Path) -> None:
        file = tmp_path / "my.yaml"
        file.write_text(TINY)

        assert load_study(file, environ={"TAPROBE_STUDY": "/gone"}).name == "tiny"
        assert load_study(environ={"TAPROBE_STUDY": str(file)}).name == "tiny"
        assert load_study(environ={"TAPROBE_STUDY": ""}).name == "demo"
        assert load_study("pilot", environ={}).name == "pilot"

    def test_the_process_environment_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = edited("rollouts_dir: a", "rollouts_dir: a\n    tokenizer: ${PLACE}")
        (tmp_path / "my.yaml").write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TAPROBE_STUDY", "my.yaml")
        monkeypatch.setenv("PLACE", "other")

        assert load_study().models["a"].tokenizer == "other"

    def test_byte_order_mark_and_crlf_are_accepted(self, tmp_path: Path) -> None:
        file = tmp_path / "windows.yaml"
        file.write_bytes(b"\xef\xbb\xbf" + TINY.replace("\n", "\r\n").encode())

        assert load_study(file, environ={}) == parse_study(TINY, "s.yaml")

    @pytest.mark.parametrize(
        ("asked", "said"),
        [("pilt.yaml", "did you mean `pilot`?"), ("zzz", "demo, demo_sweep, full")],
    )
    def test_an_absent_file_lists_the_shipped_studies(self, asked: str, said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_study(asked, environ={})

        assert caught.value.where == asked
        assert caught.value.what == "no such study"
        assert said in str(caught.value.fix)
        assert "local_rollouts" in str(caught.value.fix)

    def test_a_folder_is_no_study(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="a folder, where a study file is expected"):
            load_study(tmp_path, environ={})

    def test_not_utf8_names_the_line(self, tmp_path: Path) -> None:
        file = tmp_path / "latin.yaml"
        file.write_bytes(b"name: tiny\ndescription: caf\xe9\n")

        with pytest.raises(ConfigError, match=r"byte 0xe9.*latin\.yaml:2\nFix: save the file"):
            load_study(file, environ={})

    def test_a_huge_file_is_not_read(self, tmp_path: Path) -> None:
        file = tmp_path / "huge.yaml"
        with file.open("wb") as handle:
            handle.truncate(2**40)

        with pytest.raises(ConfigError, match="too large for a study"):
            load_study(file, environ={})

    def test_an_unreadable_file_says_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "locked.yaml"
        file.write_text(TINY)

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ConfigError, match=r"Permission denied.*locked\.yaml\nFix: check its"):
            load_study(file, environ={})

    def test_an_installation_finds_them_in_its_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site = tmp_path / "lib" / "site"
        (site / "taprobe-1.dist-info").mkdir(parents=True)
        (site / "taprobe-1.dist-info" / "METADATA").write_text("Name: taprobe\nVersion: 1\n")
        (site / "taprobe-1.dist-info" / "RECORD").write_text(
            "../../share/taprobe/studies/own.yaml,,\n../../share/taprobe/studies/gone.yaml,,\n"
        )
        studies = tmp_path / "share" / "taprobe" / "studies"
        studies.mkdir(parents=True)
        (studies / "own.yaml").write_text(TINY)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setattr(source_module, "__file__", str(site / "a" / "b" / "c.py"))

        assert shipped_studies() == {"own": studies / "own.yaml"}
        (studies / "own.yaml").unlink()
        with pytest.raises(ConfigError, match=r"no shipped studies.*\nFix: "):
            shipped_studies()


class TestValues:
    def test_whole_numbers_serve_as_numbers(self) -> None:
        study = parse_study(TINY + "labels: {percentile: 90}\n", "s.yaml")

        assert study.labels.percentile == 90.0
        assert study.seeds == (0, 1)
        assert study.models["a"].tokenizer is None

    def test_yaml_means_what_it_says(self) -> None:
        text = edited("name: tiny", "name: tiny\ndescription: no")
        text += "probes: {recipes: [{name: r, features: [text], regularization: 1e-3}]}\n"
        text += "evaluation: {baselines: []}\n"
        text += "attention: {mode: off}\n"
        study = parse_study(text, "s.yaml")

        assert study.description == "no"
        assert study.attention.mode == "off"
        assert study.probes.recipes[0].regularization == 0.001

    def test_anchors_and_aliases_may_be_used(self) -> None:
        text = edited("settings: [good]", "settings: &all [good]\nevaluation: {recall_at: [5]}")
        text = text.replace("kind: policy", "kind: policy\n    seed: &seed 3").replace(
            "seeds: [0, 1]", "seeds: [*seed]"
        )

        assert parse_study(text, "s.yaml").seeds == (3,)

    def test_variables_are_replaced_in_locations(self) -> None:
        text = edited("kind: policy", "kind: mirror\n    folder: ${ROOT:-/none}/x").replace(
            "rollouts_dir: a", "rollouts_dir: a\n    tokenizer: '${TOK}'"
        )
        study = parse_study(text, "s.yaml", environ={"ROOT": "/data", "TOK": "/tok"})

        assert study.rollouts.source.model_dump() == {"kind": "mirror", "folder": "/data/x"}
        assert study.models["a"].tokenizer == "/tok"

    def test_a_checkpoint_is_a_location_and_an_escaped_variable_is_text_anywhere(self) -> None:
        text = edited("name: tiny", "name: tiny\ndescription: costs $${HF_TOKEN} and $5").replace(
            "kind: stand_in\n      architecture: qwen2", "kind: pretrained\n      path: ${W}/$${x}"
        )
        study = parse_study(text, "s.yaml", environ={"W": "/v", "HF_TOKEN": "hf_1"})

        assert study.models["a"].checkpoint.model_dump()["path"] == "/v/${x}"
        assert study.description == "costs ${HF_TOKEN} and $5"

    @given(
        percentile=st.floats(0.001, 99.999),
        seeds=st.lists(st.integers(0, 9999), min_size=1, unique=True),
        description=st.text(
            st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$"), max_size=30
        ).filter(lambda text: not NUMBER.fullmatch(text)),  # which YAML 1.1 writes without quotes
    )
    @settings(max_examples=40, deadline=None)
    def test_a_dumped_study_reads_back_equal(
        self, percentile: float, seeds: list[int], description: str
    ) -> None:
        study = parse_study(TINY, "s.yaml").model_copy(
            update={"seeds": tuple(seeds), "description": description}
        )
        study = study.model_copy(
            update={"labels": study.labels.model_copy(update={"percentile": percentile})}
        )
        text = yaml.safe_dump(study.model_dump(mode="json"), allow_unicode=True)

        assert parse_study(text, "s.yaml", environ={}) == study


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "found", "fix"),
    [
        ("layers: all", "layer: all", 9, "models.a.layer", "unknown key", "mean `layers`?"),
        ("seeds:", "frobnicate:", 14, "frobnicate", "unknown key", "the keys here are name,"),
        ("kind: policy", "kind: hubb", 4, "rollouts.source.kind", "'hubb'", "did you mean `hub`?"),
        (
            "kind: policy",
            "seed: 1",
            3,
            "rollouts.source.kind",
            "missing",
            "one of demo, hub, mirror, policy",
        ),
        ("kind: policy", "kind: policy\n    sed: 1", 5, "source.sed", "unknown", "mean `seed`?"),
        ("qwen2", "qwen", 12, "models.a.checkpoint.architecture", "'qwen'", "mean `qwen2`?"),
        ("n_layers: 4", "n_layers: '4'", 8, "models.a.n_layers", "found '4'", "a whole number"),
        ("n_layers: 4", "n_layers: 4.5", 8, "models.a.n_layers", "4.5", "a whole number"),
        ("n_layers: 4", "n_layers: true", 8, "models.a.n_layers", "true", "a whole number"),
        ("n_layers: 4", "n_layers: 0", 8, "models.a.n_layers", "found 0", "at least 1"),
        ("n_layers: 4", "n_layers: .nan", 8, "models.a.n_layers", "'.nan'", "a finite number"),
        ("n_layers: 4", "n_layers: 1e999", 8, "models.a.n_layers", "1e999", "a finite number"),
        ("n_layers: 4", "n_layers: -.inf", 8, "models.a.n_layers", "-.inf", "a finite number"),
        ("n_layers: 4", f"n_layers: {'9' * 101}", 8, "models.a.n_layers", "999", "a finite"),
        ("n_layers: 4", "n_layers: !!int x", 8, "models.a.n_layers", "'x'", "a finite number"),
        ("n_layers: 4", "n_layers: 5", 6, "models.a", "n_layers is 5", "two numbers equal"),
        ("layers: all", "d_model: 8", 6, "models.a", "d_model is 8", "two numbers equal"),
        ("layers: all", "layers: some", 9, "models.a.layers", "'some'", "all, quartiles, mid"),
        ("layers: all", "layers: [1, x]", 9, "models.a.layers[1]", "'x'", "a whole number"),
        ("layers: all", "layers: [1, 4]", 6, "models.a", "[1, 4]", "from 0 to 3, each once"),
        ("layers: all", "layers: []", 6, "models.a", "[]", "from 0 to 3, each once"),
        ("layers: all", "layers: {x: 1}", 9, "models.a.layers", '{"x": 1}', "or a list of block"),
        ("seeds: [0, 1]", "seeds: 3", 14, "seeds", "found 3", "a list, such as [a, b]"),
        ("seeds: [0, 1]", "seeds: []", 14, "seeds", "found []", "at least 1 value(s)"),
        ("seeds: [0, 1]", "seeds: [1, 1]", 14, "seeds", "[1] given more than", "each value once"),
        ("seeds: [0, 1]", "seeds: [10000]", 14, "seeds[0]", "10000", "at most 9999"),
        ("settings: [good]", "settings: [Bad One]", 13, "settings[0]", "'Bad One'", "a-z, 0-9"),
        ("settings: [good]", "settings: ['../x']", 13, "settings[0]", "'../x'", "a-z, 0-9"),
        ("  a:\n", "  A b:\n", 6, "models.A b", "'A b' cannot be", "a-z, 0-9"),
        ("name: tiny", f"name: {'x' * 300}", 1, "name", "xxx", "1-100 characters"),
        *[
            ("name: tiny", f"name: {name}", 1, "name", f"'{name}'", "choose another name")
            for name in ("con", "current", "lpt1.x", "deadbeefdeadbeefdead", "tiny.", "nul.tar")
        ],
        ("  a:\n", "  aux:\n", 6, "models.aux", "'aux'", "choose another name"),
        ("  a:\n", "  com9.v2:\n", 6, "models.com9.v2", "'com9.v2'", "choose another name"),
        ("  a:\n", f"  {'b' * 98}:\n", 6, "b" * 98, "102 char", "shorter"),
        ("settings: [good]", "settings: [prn]", 13, "settings[0]", "'prn'", "another name"),
        ("settings: [good]", f"settings: [{'s' * 99}]", 13, "settings", "103 cha", "shorter"),
        ("name: tiny", "name: 2024-01-01x!", 1, "name", "2024-01-01x!", "a-z, 0-9"),
        ("name: tiny", "description: x", 1, "name", "missing", "add `name: ...`"),
        ("name: tiny", 'name: "a\\0b"', 1, "name", r"'a\x00b'", "remove it"),
        ("name: tiny", 'name: "\\ud800"', 1, "name", r"\ud800", "remove it"),
        ("name: tiny", "name: !!binary aGk=", 1, "name", "tag", "remove the tag"),
        ("name: tiny", "name: !!python/object:os.system x", 1, "name", "tag", "remove the tag"),
        ("settings: [good]", "settings: !!set {good}", 13, "settings", "tag", "remove the tag"),
        ("name: tiny", "1: x\nname: tiny", 1, "", "not text: 1", "in quotes"),
        ("name: tiny", "? [a]\n: x\nname: tiny", 1, "", "a collection", "in quotes"),
        ("name: tiny", "name: tiny\nname: b", 2, "name", "again, first on line 1", "keep one"),
        (
            "rollouts_dir: a",
            "rollouts_dir: a\n    tokenizer: ${GONE}",
            8,
            "tokenizer",
            "GONE is not set",
            "export GONE=...",
        ),
        (
            "rollouts_dir: a",
            "rollouts_dir: a\n    tokenizer: ${a b}",
            8,
            "tokenizer",
            "does not name a variable",
            "${VAR:-default}",
        ),
        ("name: tiny", "name: ${HOME}", 1, "name", "a variable in '${HOME}'", "models.*.tokenizer"),
        ("name: tiny", "name: x${A:-b}", 1, "name", "which is no location", "write the value"),
        (
            "name: tiny",
            "name: tiny\ndescription: by ${USER}",
            2,
            "description",
            "no location",
            "$${",
        ),
        ("settings: [good]", "settings: ['${HF_TOKEN}']", 13, "settings[0]", "no location", "$${"),
        *(
            (
                "rollouts_dir: a",
                f"rollouts_dir: a\n    tokenizer: /x/${{{name}}}",
                8,
                "tokenizer",
                "by its name holds a secret",
                "another name",
            )
            for name in ("HF_TOKEN", "OPENAI_API_KEY", "aws_secret", "A:-${MY_PASSWORD}", "HFTOKEN")
        ),
        ("rollouts_dir: a", "rollouts_dir: ../../etc", 7, "rollouts_dir", "etc", "folder name"),
        ("rollouts_dir: a", "rollouts_dir: /etc", 7, "rollouts_dir", "'/etc'", "folder name"),
        ("kind: policy", "kind: mirror\n    folder: ''", 5, "folder", "''", "1 character"),
        ("kind: policy", "kind: hub\n    repo: x", 5, "repo", "found 'x'", "org/name"),
        (
            "kind: policy",
            "kind: hub\n    repo: a/b\n    revision: main",
            6,
            "revision",
            "'main'",
            "a commit sha of 40",
        ),
        (
            "kind: policy",
            "kind: mirror\n    folder: /x",
            7,
            "models.a.tokenizer",
            "without a tokenizer",
            "set models.a.tokenizer",
        ),
        ("  source:\n    kind: policy", "  source: demo", 3, "source", "'demo'", "a mapping"),
        ("kind: stand_in", "kind: stand_in\n      d_model: 12", 10, "checkpoint", "12", "of 8"),
        (
            "kind: stand_in",
            "kind: stand_in\n      n_kv_heads: 3",
            10,
            "checkpoint",
            "3",
            "multiple",
        ),
    ],
)
def test_a_fault_names_line_key_found_and_fix(
    old: str, new: str, line: int, key: str, found: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(edited(old, new), "s.yaml", environ={})
    error = caught.value

    assert str(error.where).startswith(f"s.yaml:{line}")
    assert str(error.where).endswith(key)
    assert found in error.what
    assert fix in str(error.fix)
    assert "pydantic" not in str(error)


@pytest.mark.parametrize(
    ("part", "key", "found", "fix"),
    [
        ("labels: {percentile: 100}", "labels.percentile", "found 100", "less than 100"),
        ("labels: {percentile: high}", "labels.percentile", "'high'", "a number"),
        ("labels: {percentile: 0}", "labels.percentile", "found 0", "more than 0"),
        ("labels: {drop_last_sentence: 'no'}", "drop_last_sentence", "'no'", "true or false"),
        ("labels: {field: accuracy}", "labels.field", "'accuracy'", "did you mean"),
        ("labels: null", "labels", "null", "a mapping of keys"),
        ("splits: {train_fraction: 0.9}", "splits", "0.9 and val_fraction 0.15", "less than 1"),
        ("splits: {protocols: [lopo, lopo]}", "protocols", "['lopo']", "each value once"),
        ("evaluation: {baselines: [x]}", "evaluation.baselines", "['x']", "position_baseline"),
        (
            "evaluation: {selectivity: {recipes: [mlp]}}",
            "evaluation.selectivity.recipes",
            "['mlp']",
            "any_linear_probe",
        ),
        (
            "evaluation: {selectivity: {recipes: [linear_probe]}}\n"
            "probes: {target: importance_abs}",
            "evaluation.selectivity.recipes",
            "['linear_probe'], which predict no anchors",
            "use []",
        ),
        ("deferral: {budgets: [-0.1]}", "deferral.budgets[0]", "-0.1", "at least 0"),
        ("probes: {recipes: [{features: [text]}]}", "recipes[0].name", "missing", "add `name"),
        ("probes: {recipes: [{name: A, features: [text]}]}", "[0].name", "'A'", "matches"),
        (
            "probes: {recipes: [{name: a, features: [text]}, {name: a, features: [text]}]}",
            "probes.recipes",
            "['a', 'a']",
            "a name of its own",
        ),
        ("description: [x]", "description", '["x"]', "to text"),
        ("activations: {pooling: mean}", "activations.pooling", "unknown", "mean `poolings`?"),
        ("activations: {poolings: [meen]}", "poolings[0]", "'meen'", "did you mean `mean`?"),
        ("activations: {poolings: []}", "activations.poolings", "[]", "at least 1 value"),
        ("activations: {poolings: [mean, mean]}", "poolings", "['mean']", "each value once"),
        (
            "activations: {poolings: [last, max]}",
            "activations.poolings",
            "no pooling `mean`, which the recipes linear_probe, mlp_probe",
            "add mean",
        ),
        ("activations: {storage: bf16}", "storage", "'bf16'", "did you mean `bfloat16`?"),
        ("activations: {token_budget: 0}", "token_budget", "found 0", "at least 1"),
        ("attention: {mode: ful}", "attention.mode", "'ful'", "did you mean `full`?"),
        ("attention: {proximity: [4, -1]}", "proximity[1]", "found -1", "at least 1"),
        ("attention: {depth: rank}", "attention.depth", "unknown", "mean `depth_control`?"),
    ],
)
def test_a_fault_of_a_further_part(part: str, key: str, found: str, fix: str) -> None:
    message = faults_of(TINY + part + "\n")

    assert f"s.yaml:15, {key}" in message or f"{key}\nFix" in message
    assert found in message.partition("\nFix")[0]
    assert fix in message.partition("\nFix")[2]


class TestWholeFile:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "an empty study"),
            ("# only a comment\n", "an empty study"),
            ("- a\n- b\n", "not a mapping"),
            ("just text", "not a mapping"),
            ("a: [1, 2", "not YAML: while parsing a flow sequence"),
            ("a: b: c", "not YAML: mapping values are not allowed here"),
            ("a: 1\n\tb: 2", "not YAML"),
            ("a: 1\n---\nb: 2\n", "not YAML: expected a single document"),
            ("a: *gone", "undefined alias"),
            ("a: \x00", "not YAML: unacceptable character"),
            ("[" * 5000, "more than 20 levels"),
            ("a: &a [*a]", "more than 20 levels or 10,000 values"),
            ("#" * 1_000_001, "1,000,001 characters"),
        ],
    )
    def test_what_is_no_study_at_all(self, text: str, said: str) -> None:
        assert said in faults_of(text)

    def test_an_alias_bomb_is_refused_at_once(self) -> None:
        lines = ["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
        lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
        start = time.monotonic()

        assert "10,000 values" in faults_of("\n".join(lines))
        assert time.monotonic() - start < 5

    def test_all_faults_come_in_one_error(self) -> None:
        text = (
            TINY.replace("layers: all", "layer: all")
            .replace("kind: policy", "kind: policy\n    seed: .inf\n    n_problems: 1")
            .replace("seeds: [0, 1]", "seeds: [0, 1]\nseeds: [2]\nspans: {text_view: '${VIEW}'}")
        )
        message = faults_of(text)

        assert message.startswith("5 faults in s.yaml:\n")
        places = [line.split(":")[0].strip() for line in message.splitlines()[1:-1]]
        assert places == [
            "- line 5, rollouts.source.seed",
            "- line 6, rollouts.source.n_problems",
            "- line 11, models.a.layer",
            "- line 17, seeds",
            "- line 18, spans.text_view",
        ]

    def test_one_unset_variable_is_one_fault(self) -> None:
        text = edited("kind: policy", "kind: mirror\n    folder: ${X} and ${X}").replace(
            "rollouts_dir: a", "rollouts_dir: a\n    tokenizer: ${X}"
        )
        message = faults_of(text)

        assert "X is not set (also models.a.tokenizer)" in message
        assert "s.yaml:5, rollouts.source.folder" in message

    def test_a_faulty_document_whose_values_pass_is_still_refused(self) -> None:
        assert "given again" in faults_of(TINY + "seeds: [0]\n")

    @given(st.text(max_size=80))
    @settings(max_examples=150, deadline=None)
    def test_any_text_is_a_study_or_a_config_error(self, text: str) -> None:
        outcome = outcome_of(text)

        assert isinstance(outcome, Study) or ("s.yaml" in str(outcome) and outcome.fix)

    @given(
        st.sampled_from(["name", "models", "seeds", "settings", "rollouts", "labels", "probes"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_value_is_taken_or_a_fault_with_its_key(self, key: str, value: object) -> None:
        content = yaml.safe_load(TINY) | {key: value}
        outcome = outcome_of(yaml.safe_dump(content))

        assert isinstance(outcome, Study) or "Fix: " in str(outcome)
        assert not (isinstance(outcome, Study) and isinstance(value, float))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("{name: con, features: [position]}", "'con'"),
        ("{name: deadbeefdeadbeefdead, features: [position]}", "'deadbeefdeadbeefdead'"),
        ("{name: net, features: [position], estimator: mlp, hidden: [1000000000]}", "1000000000"),
        (
            "{name: t, features: [tokens], estimator: attention, token_probe: {width: 99999}}",
            "9999",
        ),
        ("{name: t, features: [tokens], estimator: attention, token_probe: {depth: 65}}", "65"),
        (f"{{name: net, features: [position], estimator: mlp, hidden: {[2] * 99}}}", "2, 2"),
    ],
)
def test_a_recipe_that_would_fail_after_hours_is_refused_when_it_is_read(
    change: str, found: str
) -> None:
    text = f"{TINY}probes:\n  recipes:\n    - {change}\nevaluation: {{baselines: []}}\n"
    with pytest.raises(ConfigError) as refused:
        parse_study(text, "s.yaml")
    line = text.splitlines().index(f"    - {change}") + 1
    assert f"s.yaml:{line}, probes.recipes[0]" in str(refused.value.where)
    assert found in refused.value.what
