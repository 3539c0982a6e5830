# SPDX-License-Identifier: Apache-2.0
"""2^x on Hopper: most of a scan's by the special function units, of bfloat16 a share by a polynomial.

Those units take eight cycles for one of a warp, as long as eight other instructions.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.ops.selective_scan.gpu.threads import F32, HELD, STATES, add, element, fragments, i32

# 2^f = 1 + f q(f) on [-1/2, 1/2], q lowest first: 2^f - 1 to 2e-5 of itself, so that slow decays are as right as fast.
POLYNOMIAL = (0.6931368708610535, 0.24023252725601196, 0.05583728849887848, 0.00961811188608408)


def exp2(own, exponents, chosen: tuple[int, ...]):
    """2^exponents, ``[channels, 16]`` of `own` threads, none above 0; at `chosen` of a thread's by a polynomial."""

    @plgpu.inline_mgpu(
        arg_types=(own.both,), return_type=plgpu.ShapeDtypeStruct((own.channels, STATES), F32, layout=own.both)
    )
    def exp2(_, exponents):
        registers = []
        for v, register in enumerate(exponents.registers.flat):
            ways = (_polynomial if v * HELD + k in chosen else _special for k in range(HELD))
            values = [way(element(register, k)) for k, way in enumerate(ways)]
            registers.append(vector.from_elements(register.type, values))
        return fragments(registers, own.both, (own.channels, STATES))

    return exp2(exponents)


def _special(exponent):
    return llvm.inline_asm(ir.F32Type.get(), [exponent], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _polynomial(exponent):
    """2^exponent, 2^-126 where it is below."""
    number = lambda value: mgpu.c(float(value), ir.F32Type.get())
    bits = lambda value: arith.bitcast(ir.IntegerType.get_signless(32), value)
    rounding = number(1.5 * 2.0**23)  # added to it, the last bits of a number are the nearest integer
    exponent = arith.maximumf(exponent, number(-126.0))
    shifted = arith.addf(exponent, rounding)
    f = arith.subf(exponent, arith.subf(shifted, rounding))
    *rest, power = (number(c) for c in (1.0, *POLYNOMIAL))
    for c in reversed(rest):
        power = add(arith.mulf(power, f, fastmath=arith.FastMathFlags.contract), c)
    return arith.bitcast(ir.F32Type.get(), arith.addi(bits(power), arith.shli(bits(shifted), i32(23))))
