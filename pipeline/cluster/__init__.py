"""Clips through decoders and models on a Ray cluster; the only folder that imports Ray."""

from pipeline.cluster.connect import EngineConfig
from pipeline.cluster.engine import ClipResult, Engine
from pipeline.cluster.worker import Answerer, Build, OneByOne

__all__ = ["Answerer", "Build", "ClipResult", "Engine", "EngineConfig", "OneByOne"]
