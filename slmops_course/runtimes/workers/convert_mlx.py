"""Convert a model folder for MLX: python -P convert_mlx.py MODEL_FOLDER OUT_FOLDER BITS GROUP_SIZE

BITS is 32 or 16 for floating point, 8 or 4 for whole numbers in groups that share a scale and an offset.
"""

import sys


def convert(folder: str, out: str, bits: str, group_size: str) -> None:
    import mlx.core as mx
    from mlx_lm.convert import convert

    mx.set_default_device(mx.cpu)
    if int(bits) >= 16:
        convert(folder, out, dtype=f"float{bits}")
    else:
        convert(folder, out, dtype="float32", quantize=True, q_bits=int(bits), q_group_size=int(group_size))


if __name__ == "__main__":
    convert(*sys.argv[1:])
