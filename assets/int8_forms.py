"""One matrix product in the forms that int8 could have: error and time.

    python assets/int8_forms.py
    valgrind --tool=none -q python assets/int8_forms.py --quick     on a CPU without AVX-512

valgrind passes AVX2 on to a program and hides AVX-512 and VNNI; its times say nothing.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from export import MS, block_of, quantize_blocks

FORMS = {"float32": 0, "s8 in 7 bits": 64, "s8 in 8 bits": 127, "u8 around 128": 127}
FORMS |= {"MatMulNBits, 8 bits": 8, "MatMulNBits, 4 bits": 4}


def product(form, weight):
    """An ONNX Runtime session that multiplies x (M, K) by weight (N, K)."""
    (N, K), nodes, constants = weight.shape, [], []

    def constant(name, array):
        constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def op(kind, inputs, output, **how):
        domain = MS if kind.startswith("MatMul") and kind != "MatMul" else ""
        nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **how))

    if form == "float32":
        op("MatMul", ["x", constant("weight", weight.T)], "y")
    elif form.startswith("MatMulNBits"):
        bits, block = FORMS[form], block_of(K)
        packed, scales = quantize_blocks(weight, bits, block)
        inputs = ["x", constant("weight", packed), constant("scales", scales.reshape(-1))]
        how = dict(N=N, K=K, bits=bits, block_size=block, accuracy_level=4)
        op("MatMulNBits", inputs, "y", **how)
    else:
        scales = np.abs(weight).max(1) / FORMS[form]
        codes, zero = np.round(weight / scales[:, None]).T, []
        if form.startswith("u8"):
            codes, zero = codes + 128, [constant("zero", np.full(N, 128, np.uint8))]
        codes = constant("weight", codes.astype(np.uint8 if zero else np.int8))
        constant("last", np.array([-1]))
        constant("step", np.array(1 / 127, np.float32))
        constant("middle", np.array(128, np.uint8))
        op("Abs", ["x"], "sizes")
        op("ReduceMax", ["sizes", "last"], "size")  # a scale for each token
        op("Div", ["x", "size"], "unit")
        op("QuantizeLinear", ["unit", "step", "middle"], "x codes")
        scales = constant("scales", scales.astype(np.float32))
        inputs = ["x codes", codes, "step", scales, "middle", *zero]
        op("MatMulIntegerToFloat", inputs, "product")
        op("Mul", ["product", "size"], "y")
    ends = [helper.make_tensor_value_info(*end) for end in (("x", 1, ["M", K]), ("y", 1, ["M", N]))]
    graph = helper.make_graph(nodes, form, ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers)


def main():
    quick, rng = "--quick" in sys.argv, np.random.default_rng(0)
    K, N, repeats = (768, 192, 1) if quick else (768, 2072, 60)
    weight = rng.standard_normal((N, K)).astype(np.float32)
    channels = np.exp(0.5 * rng.standard_normal(K))  # some are larger than others
    for M in (1, 16) if quick else (1, 512):
        x = (rng.standard_normal((M, K)) * channels).astype(np.float32)
        exact, seconds = x.astype(np.float64) @ weight.T, {form: [] for form in FORMS}
        sessions = {form: product(form, weight) for form in FORMS}
        for _ in range(repeats):  # in turn, so that a busy machine is so for all
            for form, session in sessions.items():
                begin = time.perf_counter()
                found = session.run(None, dict(x=x))[0]
                seconds[form].append(time.perf_counter() - begin)
                if len(seconds[form]) == repeats:
                    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
                    best = 1000 * min(seconds[form])
                    print(f"{M:4} x {K} x {N}  {form:20} error {error:.2%}  {best:.3f} ms")


if __name__ == "__main__":
    main()
