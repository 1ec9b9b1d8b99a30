"""The rules of the house, as tests over the sources: who imports what, who writes what, and where a test stands."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources import ROOT, circles, edges, imports, modules, top_level

MODULES = modules()

TESTED_TOGETHER = {
    "jobs/test_sweep.py": ("pipeline.sweep.run",),
    "jobs/test_videoqa.py": ("pipeline.videoqa",),
    "pipeline/cluster/test_engine.py": (
        "pipeline.cluster.connect",
        "pipeline.cluster.worker",
    ),
    "pipeline/manifest/test_read.py": ("pipeline.manifest.rows",),
    "pipeline/model/frames/test_frames.py": (
        "pipeline.model.frames.base",
        "pipeline.model.frames.patched",
        "pipeline.model.frames.stacked",
    ),
    "pipeline/model/test_answering.py": (
        "pipeline.model.answer",
        "pipeline.model.clock",
        "pipeline.model.forms",
    ),
    "pipeline/model/test_session.py": (
        "pipeline.model.admission",
        "pipeline.model.prefix",
    ),
    "pipeline/output/test_folder.py": (
        "pipeline.output.schema",
        "pipeline.output.writer",
    ),
    "pipeline/output/test_record.py": ("pipeline.output.events",),
    "pipeline/sweep/report/test_gallery.py": ("pipeline.sweep.gallery",),
    "pipeline/sweep/report/test_page.py": ("pipeline.sweep.report.pictures",),
    "pipeline/test_config.py": ("pipeline.commandline",),
    "pipeline/test_embedded.py": (
        "pipeline.embedded.demo",
        "pipeline.embedded.questions",
        "pipeline.embedded.scenes",
        "pipeline.embedded.training.architecture",
        "pipeline.embedded.training.batches",
        "pipeline.embedded.training.evaluate",
        "pipeline.embedded.training.packed",
        "pipeline.embedded.training.tokenizer",
        "pipeline.embedded.training.train",
    ),
    "pipeline/test_embedded_long.py": (
        "pipeline.embedded.long.demo",
        "pipeline.embedded.long.questions",
        "pipeline.embedded.long.scenes",
        "pipeline.embedded.long.training.batches",
        "pipeline.embedded.long.training.evaluate",
        "pipeline.embedded.long.training.growth",
        "pipeline.embedded.long.training.train",
    ),
    "pipeline/test_job.py": ("pipeline.errors",),
    "vitcop/methods/test_before.py": (
        "vitcop.methods.average_pool",
        "vitcop.methods.divprune",
        "vitcop.methods.downscale",
        "vitcop.methods.evs",
        "vitcop.methods.fastvid",
        "vitcop.methods.flashvid",
        "vitcop.methods.frame_subsample",
        "vitcop.methods.grid",
        "vitcop.methods.holitom",
        "vitcop.methods.kmeans",
        "vitcop.methods.one_frame",
        "vitcop.methods.prumerge",
        "vitcop.methods.random",
        "vitcop.methods.text_only",
        "vitcop.methods.vcast",
        "vitcop.methods.vidcom2",
        "vitcop.methods.visionzip",
        "vitcop.ops.similarity",
    ),
    "vitcop/methods/test_inside.py": (
        "vitcop.methods.dart",
        "vitcop.methods.expected_attention",
        "vitcop.methods.fastv",
        "vitcop.methods.keydiff",
        "vitcop.methods.knorm",
        "vitcop.methods.pyramiddrop",
        "vitcop.methods.sparsevlm",
        "vitcop.methods.sparsevlm_plus",
        "vitcop.methods.vscan",
    ),
    "vitcop/methods/test_tango.py": ("vitcop.ops.rotation",),
    "vitcop/methods/test_vitcop.py": ("vitcop.methods.staged",),
    "vitcop/methods/test_vitcop_video.py": ("vitcop.ops.importance",),
    "vitcop/test_families.py": (
        "vitcop.families.base",
        "vitcop.families.frame_tower",
        "vitcop.families.internvl",
        "vitcop.families.llava",
        "vitcop.families.llava_next_video",
        "vitcop.families.llava_onevision",
        "vitcop.families.qwen_vl",
        "vitcop.families.video_llava",
    ),
    "vitcop/test_pruning.py": (
        "vitcop.errors",
        "vitcop.methods.base",
        "vitcop.methods.keep_all",
    ),
}
"""Modules without a test file of their own, under the file whose tests run them."""


HOOKS = ("vitcop.pruning", "vitcop.prefill", "vitcop.cache", "vitcop.inputs", "vitcop.vision")
"""What `prune` is made of."""


def importing(package: str) -> set[str]:
    """The modules that import a top-level package."""
    return {name for name, path in MODULES.items() if package in top_level(path)}


def inside(names: set[str], folder: str) -> set[str]:
    return {name for name in names if name == folder or name.startswith(f"{folder}.")}


# -- imports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("below", "above"), [("vitcop", "pipeline"), ("vitcop", "jobs"), ("pipeline", "jobs")])
def test_nothing_is_imported_from_above(below: str, above: str) -> None:
    assert not inside(importing(above), below)


@pytest.mark.parametrize("package", ["ray", "decord", "av", "pyarrow", "matplotlib", "tyro", "PIL"])
def test_vitcop_does_not_know(package: str) -> None:
    assert not inside(importing(package), "vitcop")


def test_ray_is_known_to_one_folder() -> None:
    users = importing("ray")
    assert users
    assert users == inside(users, "pipeline.cluster")


@pytest.mark.parametrize("package", ["torch", "transformers", "vitcop"])
def test_video_does_not_know(package: str) -> None:
    """Decoding runs in processes of its own, which start without the model's libraries."""
    graph = edges()
    needed, rest = set(), list(inside(set(MODULES), "pipeline.video"))
    while rest:  # also what it imports of the pipeline
        name = rest.pop()
        if name not in needed:
            needed.add(name)
            rest.extend(graph[name])
    assert len(needed) > 5
    assert not needed & importing(package)


def test_the_folders_of_the_library_import_downwards() -> None:
    """Operations know no method, family or hook; families know no method, and methods know no family or hook.

    Methods read profiles, so profiles know none of them; what chooses among methods stands above all.
    """
    rules = {
        "vitcop.ops": ("vitcop.methods", "vitcop.families", "vitcop.language", *HOOKS),
        "vitcop.families": ("vitcop.methods", "vitcop.calibration", *HOOKS),
        "vitcop.methods": ("vitcop.families", *HOOKS),
        "vitcop.calibration.profiles": ("vitcop.methods", "vitcop.families", *HOOKS),
        "vitcop.calibration.measure": ("vitcop.methods", "vitcop.pruning"),
        "vitcop.language": ("vitcop.methods", "vitcop.families", *HOOKS),
    }
    graph = edges()
    for below, above in rules.items():
        mine = inside(set(graph), below)
        assert mine
        for name in mine:
            wrong = [target for target in graph[name] if f"{target}.".startswith(tuple(f"{part}." for part in above))]
            assert not wrong, f"{name} imports {wrong}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not circles(edges())


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert not circles({"a": {"b"}, "b": set(), "p": {"p.x"}, "p.x": {"p"}})


def test_imports_under_type_checking_and_inside_functions_count(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    late = "if TYPE_CHECKING:\n    import ray.util\ndef late():\n    from av import open\n"
    file.write_text(f"from typing import TYPE_CHECKING\n{late}")
    assert imports(file) == {"typing.TYPE_CHECKING", "ray.util", "av.open"}


def test_the_library_runs_without_what_the_extras_install() -> None:
    """`import vitcop` loads none of it, and no module of the library needs it; transformers brings the rest itself."""
    absent = {"PIL", "av", "decord", "jinja2", "matplotlib", "pyarrow", "ray", "scipy", "tyro"}
    code = (
        "import importlib, sys, vitcop\n"
        f"loaded = {absent - {'PIL', 'jinja2', 'scipy'}} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"  # None: an import of it fails
        f"for name in {sorted(inside(set(MODULES), 'vitcop'))}: importlib.import_module(name)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


# -- jobs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(inside(set(MODULES), "jobs")))
def test_jobs_are_short_and_leave_the_path_alone(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert "sys.path" not in text


# -- parts and run.json ------------------------------------------------------------------------------------------------

WRITERS = {"write_text", "write_bytes", "open"}
RESULTS = ("RUN_FILE", "PART_PATTERN", "run.json", "part-")


def writing_statements(path: Path) -> Iterator[str]:
    """Simple statements and heads of `with` blocks that write a Parquet file, or a file named as results are."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        heads = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
        heads += [node] if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign | ast.Return) else []
        for head in heads:
            called = {_called(call) for call in ast.walk(head) if isinstance(call, ast.Call)}
            if not any(name in WRITERS or name.startswith(("write_", "ParquetWriter")) for name in called):
                continue  # cutting the source out is slow
            source = ast.get_source_segment(text, head) or ""
            names_results = any(result in source for result in RESULTS)
            if "pq.write_" in source or "ParquetWriter" in called or (called & WRITERS and names_results):
                yield source


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_output_is_the_only_writer_of_parts_and_of_the_record() -> None:
    writers = {name for name, path in MODULES.items() if any(writing_statements(path))}
    assert writers == {"pipeline.output.folder"}


# -- tests -------------------------------------------------------------------------------------------------------------


def own_test(name: str) -> Path:
    """Where one looks for the tests of a module."""
    path = MODULES[name].relative_to(ROOT)
    return ROOT / "tests" / path.parent / f"test_{path.stem.strip('_')}.py"


def test_every_module_has_its_test_file_where_one_looks_for_it() -> None:
    elsewhere = {name for names in TESTED_TOGETHER.values() for name in names}
    bare = {name for name, path in MODULES.items() if path.name != "__init__.py" and not own_test(name).is_file()}
    # jobs/calibrate.py hands on to pipeline/calibrate.py and is run by its tests
    assert bare - {"jobs.calibrate"} == elsewhere


def test_files_that_test_several_modules_are_there() -> None:
    assert not [file for file in TESTED_TOGETHER if not (ROOT / "tests" / file).is_file()]
