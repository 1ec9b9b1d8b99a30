"""Clips that say what shall happen to them, and an answerer that does it. Imported by Ray's workers, too."""

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cluster import OneByOne
from pipeline.errors import ConfigError, RowError


@dataclass(frozen=True)
class FakeClip:
    """`decode` and `answer` name a fault of that stage; `marks` is a folder that the stages leave traces in."""

    name: str
    marks: Path
    decode: str = ""
    answer: str = ""

    def first_time(self, event: str) -> bool:
        """Leaves a mark; whether it is the first one of this event."""
        with (self.marks / f"{self.name}.{event}").open("a") as file:
            file.write(f"{os.getpid()}\n")
            return file.tell() == len(f"{os.getpid()}\n")

    def pids(self, event: str) -> list[int]:
        """Processes that left a mark of this event."""
        path = self.marks / f"{self.name}.{event}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def fake_decode(clip: FakeClip, *, again: bool = False) -> np.ndarray:
    first = clip.first_time("decode")
    match clip.decode:
        case "bad":
            raise RowError("bad_video", f"{clip.name} is bad")
        case "bug":
            raise ZeroDivisionError("in the decoder")
        case "timeout_bug":
            raise TimeoutError("a file server did not answer")
        case "hang":
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter lock, as a hung decoder may
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "crash_once" if first:
            os.kill(os.getpid(), signal.SIGSEGV)
    return np.full((8, 64, 64, 3), len(clip.name), np.uint8)


class FakeAnswerer(OneByOne):
    decode = staticmethod(fake_decode)

    def answer(self, clip: FakeClip, video: np.ndarray) -> dict[str, object]:
        first = clip.first_time("answer")
        match clip.answer:
            case "bad":
                raise RowError("bad_answer", f"{clip.name} has no answer")
            case "bug":
                raise ZeroDivisionError("in the model")
            case "slow":
                time.sleep(0.3)
            case "exit":
                sys.exit("the device is lost")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill_once" if first:
                os.kill(os.getpid(), signal.SIGKILL)
        return {"name": clip.name, "mean": float(video.mean()), "pid": os.getpid()}


def build_fake(threads: int) -> FakeAnswerer:
    return FakeAnswerer()


def build_unknown_model(threads: int) -> FakeAnswerer:
    raise ConfigError("there is no model 'x'")


def build_buggy(threads: int) -> FakeAnswerer:
    raise ZeroDivisionError("in the model's constructor")


def build_deadly(threads: int) -> FakeAnswerer:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
