"""Every clip has exactly one result, whatever dies on the way."""

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.cluster import ClipResult, Engine, EngineConfig
from pipeline.cluster import engine as engine_module
from pipeline.errors import ConfigError
from tests.pipeline.cluster.fakes import FakeClip, build_buggy, build_deadly, build_fake, build_unknown_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def run(clips: list[FakeClip], **settings: float) -> dict[str, ClipResult[FakeClip]]:
    with Engine(build_fake, EngineConfig(**settings)) as engine:
        results = list(engine.run(clips))
    assert sorted(result.clip.name for result in results) == sorted(clip.name for clip in clips)
    return {result.clip.name: result for result in results}


def wait_until_gone(pid: int) -> None:
    """Fails unless the process ends within 20 seconds; Ray's kill is sent, not waited for."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} still runs")


def test_answers_come_from_the_frames_of_the_clip(tmp_path: Path) -> None:
    clips = [FakeClip("x" * length, tmp_path) for length in range(1, 10)]
    for name, result in run(clips).items():
        assert result.error is None
        assert result.attempt == 1
        assert result.answers["mean"] == len(name)


def test_faults_of_a_clip_are_its_own(tmp_path: Path) -> None:
    """Bad files, bugs and crashes in decoder and model: an error for that clip, an answer for all others."""
    faults = {
        "bad_video": FakeClip("decode_bad", tmp_path, decode="bad"),
        "decode_crashed": FakeClip("decode_crash", tmp_path, decode="crash"),
        "bad_answer": FakeClip("answer_bad", tmp_path, answer="bad"),
    }
    bugs = [
        FakeClip("decode_bug", tmp_path, decode="bug"),
        FakeClip("decode_timeout_bug", tmp_path, decode="timeout_bug"),
        FakeClip("answer_bug", tmp_path, answer="bug"),
    ]
    good = [FakeClip(f"good{i}", tmp_path) for i in range(4)] + [FakeClip("again", tmp_path, decode="crash_once")]
    results = run([*faults.values(), *good[:2], *bugs, *good[2:]])
    for error_type, clip in faults.items():
        assert results[clip.name].error.error_type == error_type
    for clip in bugs:
        assert results[clip.name].error.error_type == "internal_error"
    assert results["answer_bug"].error.message == "ZeroDivisionError: in the model"
    assert all(results[clip.name].error is None for clip in good)
    assert len(faults["decode_crashed"].pids("decode")) == 2


def test_hung_decode_is_killed_at_its_deadline(tmp_path: Path) -> None:
    hung = FakeClip("hung", tmp_path, decode="hang")
    clips = [hung, *(FakeClip(f"good{i}", tmp_path) for i in range(3))]
    results = run(clips, decode_timeout=1.5)
    assert results["hung"].error.error_type == "decode_timeout"
    assert all(result.error is None for name, result in results.items() if name != "hung")
    (pid,) = hung.pids("decode")
    wait_until_gone(pid)


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_clip_that_kills_two_workers_is_given_up_and_no_other(tmp_path: Path, how: str) -> None:
    poison = FakeClip("poison", tmp_path, answer=how)
    clips = [FakeClip(f"good{i}", tmp_path) for i in range(6)]
    results = run([*clips[:2], poison, *clips[2:]])
    assert results["poison"].error.error_type == "worker_died"
    assert results["poison"].attempt == 2
    assert ("the device is lost" in results["poison"].error.message) == (how == "exit")
    assert len(set(poison.pids("answer"))) == 2
    assert all(results[clip.name].error is None for clip in clips)


def test_killed_worker_is_replaced_and_its_clips_are_answered(tmp_path: Path) -> None:
    clips = [FakeClip(f"clip{i}", tmp_path, answer="slow") for i in range(8)]
    results = []
    with Engine(build_fake, EngineConfig(workers=2)) as engine:
        for result in engine.run(clips):
            if not results:
                os.kill(result.answers["pid"], signal.SIGKILL)
            results.append(result)
    assert sorted(result.clip.name for result in results) == [clip.name for clip in clips]
    assert all(result.error is None for result in results)
    assert {result.attempt for result in results} == {1, 2}
    assert len({result.answers["pid"] for result in results}) == 3


def test_no_more_clips_are_decoded_than_asked_for(tmp_path: Path) -> None:
    clips = [FakeClip(f"clip{i}", tmp_path, answer="slow") for i in range(6)]
    with Engine(build_fake, EngineConfig(decode_ahead=1)) as engine:
        for done, _ in enumerate(engine.run(clips), start=1):
            assert sum(bool(clip.pids("decode")) for clip in clips) <= done + 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (build_unknown_model, "there is no model 'x'"),
        (build_buggy, "the model can't be loaded: ZeroDivisionError: in the model's constructor"),
        (build_deadly, "workers die while they load the model"),
    ],
)
def test_model_that_cannot_be_loaded_ends_the_job(tmp_path: Path, build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message), Engine(build, EngineConfig()) as engine:
        list(engine.run([FakeClip("clip", tmp_path)]))


def test_model_that_dies_on_every_clip_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_GIVEN_UP_UNANSWERED", 2)
    clips = [FakeClip(f"clip{i}", tmp_path, answer="kill") for i in range(20)]
    with (
        pytest.raises(ConfigError, match="no clip has been answered, and 2 were given up"),
        Engine(build_fake, EngineConfig()) as engine,
    ):
        list(engine.run(clips))


def test_more_gpus_than_the_cluster_has_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match="0 GPUs of this cluster"),
        Engine(build_fake, EngineConfig(gpus_per_worker=1)),
    ):
        pass


def test_workers_are_gone_after_the_context(tmp_path: Path) -> None:
    results = run([FakeClip("clip", tmp_path)])
    wait_until_gone(results["clip"].answers["pid"])


@pytest.mark.parametrize(
    ("cluster", "settings", "expected"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, {}, (2, 1.0, 4)),
        ({"CPU": 8.0, "GPU": 2.0}, {"workers": 1}, (1, 1.0, 8)),
        ({"CPU": 8.0, "GPU": 2.0}, {"gpus_per_worker": 0.5}, (4, 0.5, 2)),
        ({"CPU": 8.0, "GPU": 2.0}, {"gpus_per_worker": 0.0}, (1, 0.0, 8)),
        ({"CPU": 2.0}, {}, (1, 0.0, 2)),
        ({"CPU": 2.0}, {"workers": 4}, (4, 0.0, 1)),
        ({"CPU": 8.0, "GPU": 2.0}, {"workers": 3}, "3 workers with 1 GPUs each need more than the 2 GPUs"),
        ({"CPU": 8.0, "GPU": 2.0}, {"gpus_per_worker": 4.0}, "1 workers with 4 GPUs each need more than the 2 GPUs"),
        ({"CPU": 8.0}, {"gpus_per_worker": 1.0}, "need more than the 0 GPUs"),
        ({"GPU": 1.0}, {}, "this cluster has no CPUs"),
    ],
)
def test_workers_fit_the_cluster(
    cluster: dict[str, float], settings: dict[str, float], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: cluster)
    engine = Engine(build_fake, EngineConfig(**settings))
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            engine.__enter__()
    else:
        with engine:
            resources = engine.resources
        assert (resources.workers, resources.gpus, resources.threads) == expected


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1", "127.0.0.1:port"])
def test_address_without_a_cluster_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is '{address}', but no Ray cluster answers there"):
        Engine(build_fake, EngineConfig()).__enter__()
