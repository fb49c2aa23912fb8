"""Run an exported network with numpy and onnxruntime alone.

    multifire export RUN --to onnx --out network.onnx   # or onnx-int8
    python run_onnx.py network.onnx frames.npy          # frames [T, N, C, H, W], as the network was trained to see them

A file written with --step is run frame by frame; both print the class of each sample.
"""

import json
import sys

import numpy as np
import onnxruntime


def main(network: str, frames: str) -> None:
    """Print the predicted class of every sample."""
    x_TNCHW = np.load(frames, allow_pickle=False).astype(np.float32)
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    if about["kind"] == "sequence":
        logits_NL = session.run(["logits"], {"x": x_TNCHW})[0]
    else:
        logits_NL = step_by_step(session, x_TNCHW)
    classes = json.loads(about["provenance"])["data"]["classes"]
    for label in logits_NL.argmax(1):
        print(classes[label])


def step_by_step(session: onnxruntime.InferenceSession, x_TNCHW: np.ndarray) -> np.ndarray:
    """Mean logits of the frames, one after the other: the state that one step returns is the next one's input."""
    frame, *before = session.get_inputs()
    samples = x_TNCHW.shape[1]
    shapes = [[samples if side == "N" else side for side in state.shape] for state in before]
    states = [np.zeros(shape, np.float32) for shape in shapes]
    total = 0
    for frame_NCHW in x_TNCHW:
        named = {state.name: value for state, value in zip(before, states, strict=True)}
        logits_NL, *states = session.run(None, {frame.name: frame_NCHW, **named})
        total = total + logits_NL
    return total / len(x_TNCHW)


if __name__ == "__main__":
    main(*sys.argv[1:])
