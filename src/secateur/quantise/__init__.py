"""int8 after pruning, by the runtimes' own tools, and beside it what int8 and pruning are worth alone.

    from secateur import quantise
    done = quantise.quantise(result.model, ((x,), {}), data, "out-int8", dense=model)      # ONNX Runtime; How(runtime="openvino") for NNCF
    for row in done.rows:
        print(row.name, row.accuracy, row.bytes, row.seconds.median)
    print(*done.verdict, *done.warnings, sep="\\n")

Calibration rows come from `data.train`, what is measured from `data.test`. Weights are scaled symmetrically, so that zeros stay zero.
"""

from secateur.quantise.run import FACTS, KINDS, RUNTIMES, How, Quantised, Row, int8_file, quantise

__all__ = ["FACTS", "KINDS", "RUNTIMES", "How", "Quantised", "Row", "int8_file", "quantise"]
