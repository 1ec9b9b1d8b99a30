"""The pruning methods. A new one is a file here and a line below that imports its class under its own name."""

from __future__ import annotations

from vitcop.methods.average_pool import AveragePool as AveragePool
from vitcop.methods.base import Method as Method
from vitcop.methods.dart import DART as DART
from vitcop.methods.divprune import DivPrune as DivPrune
from vitcop.methods.downscale import Downscale as Downscale
from vitcop.methods.evs import EVS as EVS
from vitcop.methods.expected_attention import ExpectedAttention as ExpectedAttention
from vitcop.methods.fastv import FastV as FastV
from vitcop.methods.fastvid import FastVID as FastVID
from vitcop.methods.flashvid import FlashVID as FlashVID
from vitcop.methods.frame_subsample import FrameSubsample as FrameSubsample
from vitcop.methods.grid import Grid as Grid
from vitcop.methods.holitom import HoliTom as HoliTom
from vitcop.methods.keep_all import KeepAll as KeepAll
from vitcop.methods.keydiff import KeyDiff as KeyDiff
from vitcop.methods.kmeans import KMeans as KMeans
from vitcop.methods.knorm import Knorm as Knorm
from vitcop.methods.one_frame import OneFrame as OneFrame
from vitcop.methods.prumerge import PruMerge as PruMerge
from vitcop.methods.pyramiddrop import PyramidDrop as PyramidDrop
from vitcop.methods.random import Random as Random
from vitcop.methods.random_stages import RandomStages as RandomStages
from vitcop.methods.sparsevlm import SparseVLM as SparseVLM
from vitcop.methods.sparsevlm_plus import SparseVLMPlus as SparseVLMPlus
from vitcop.methods.tango import Tango as Tango
from vitcop.methods.text_only import TextOnly as TextOnly
from vitcop.methods.vcast import VCAST as VCAST
from vitcop.methods.vidcom2 import VidCom2 as VidCom2
from vitcop.methods.visionzip import VisionZip as VisionZip
from vitcop.methods.vitcop import ViTCoP as ViTCoP
from vitcop.methods.vitcop_video import ViTCoPVideo as ViTCoPVideo
from vitcop.methods.vscan import VScan as VScan

METHODS: dict[str, type[Method]] = {
    value.name: value
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, Method) and value is not Method
}


def get_method(name: str) -> type[Method]:
    """Return the method class called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown pruning method {name!r}; known are {', '.join(sorted(METHODS))}")
    return METHODS[name]
