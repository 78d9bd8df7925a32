"""Sums over the mailboxes of a mesh's GPUs, inside kernels for Hopper GPUs (Pallas, Mosaic GPU).

Every warp sends what it holds of a row to the warps with its numbers on the other GPUs, and reads what they sent. A
packet has two words of numbers and behind each a flag, the number of the sum; GPUs write eight bytes in one piece, so
where the flag is there, the word is.

Two sums in turn have memory of their own. That is enough: who has a part of a sum knows that its sender has ended the
kernel of the sum before, and read all of it. Warps count for themselves the sums that they took part in, as one
without rows learns nothing of the others; a row always belongs to the same ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu

from sparsex_kernels.mailboxes import HEADER, MOST_WARPS, NUMBERS, PACKET
from sparsex_kernels.mosaic import Ref

# Looks at a packet before a program gives up, about a minute: another GPU has failed, and this one should say so.
MOST_LOOKS = 1 << 27
_SCALAR = plgpu.Layout.WG_SPLAT(())
_WORDS = PACKET // 8  # of numbers in a packet


class Rows(NamedTuple):
    """What goes through mailboxes.

    Attributes:
      most: `Mailboxes.rows`.
      width: numbers of a row.
      layout: of those that a warpgroup holds, 16 bits each, four beside each other in each lane.
    """

    most: int
    width: int
    layout: Any


class Sum(NamedTuple):
    """A sum over the devices in which a program takes part.

    Attributes:
      table: `Mailboxes.table` of this device, `[1, words]`.
      program: its number, less than 512.
      number: of the sum, as the program counts them, alike on all devices.
    """

    table: Ref
    program: Array
    number: Array
    rows: Rows


def begin_sum(table: Ref, program: Array, rows: Rows) -> Sum:
    """Look up the sum's number. Done early, it is there when it is needed."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR),
    )
    def read(_: Any, table: ir.Value, program: Any) -> Any:
        counter = _counter(_Table(table), _scalar(program))
        read = "ld.volatile.global.b32 $0, [$1];"
        last = mgpu.utils.inline_ptx(read, counter, result_types=_i32(), has_side_effects=True)
        number = arith.addi(last, _int32(1))
        return mgpu.FragmentedArray.splat(number, (), mgpu.WGSplatFragLayout(()), is_signed=True)

    return Sum(table, program, read(table, program), rows)


def end_sum(sum_: Sum) -> None:
    """Count a sum in which the program had some row."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
    def count(_: Any, table: ir.Value, program: Any, number: Any) -> None:
        _count(_counter(_Table(table), _scalar(program)), _scalar(number))

    count(sum_.table, sum_.program, sum_.number)


def sum_over_devices(sum_: Sum, row: Array, own: Array) -> Array:
    """The sum of a row's parts on all devices, in float32, added in the devices' order.

    Args:
      own: this warpgroup's numbers of this device's part.
    """
    rows = sum_.rows

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, rows.layout),
        return_type=plgpu.ShapeDtypeStruct(own.shape, jnp.float32, layout=rows.layout),
    )
    def add(_: Any, table: ir.Value, row: Any, number: Any, own: Any) -> Any:
        packets = [mgpu.utils.bitcast(part, ir.VectorType.get((_WORDS,), _i32())) for part in own.registers.flat]
        parts = _exchanged(_Table(table), _scalar(row), _scalar(number), packets, rows)
        sums = [_sum_of(same, own.registers.flat[0].type) for same in zip(*parts, strict=True)]
        registers = np.array(sums, dtype=object).reshape(own.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=own.layout, _is_signed=None)

    return add(sum_.table, row, sum_.number, own)


class _Table:
    """What a device's line of the table says, as values of the program."""

    def __init__(self, table: ir.Value) -> None:
        self._words = mgpu.utils.memref_ptr(table)
        self.devices = ir.MemRefType(table.type).shape[-1] // 2 - 1
        self.rank = llvm.load(_i32(), self._words)
        self.own_mailbox = self.mailbox(self.rank)

    def mailbox(self, device: int | ir.Value) -> ir.Value:
        """The address of a device's."""
        number = _int32(device) if isinstance(device, int) else device
        word = arith.addi(arith.muli(number, _int32(2)), _int32(2))
        return llvm.load(_i64(), mgpu.utils.getelementptr(self._words, [word], _i32()))


def _exchanged(
    table: _Table, row: ir.Value, flag: ir.Value, own: Sequence[ir.Value], rows: Rows
) -> list[list[ir.Value]]:
    """Each device's words of the packets that this thread has, `[devices][packets]`."""
    line = rows.width // NUMBERS  # packets; each thread's first ones come first, then the second ones
    step = PACKET * (line // len(own))
    half = arith.andi(flag, _int32(1))

    def place(mailbox: ir.Value, sender: ir.Value) -> ir.Value:
        """Where this thread's first packet from `sender` is."""
        lines = arith.addi(arith.muli(half, _int32(table.devices)), sender)
        packets = arith.addi(arith.muli(lines, _int32(rows.most)), row)
        packet = arith.addi(arith.muli(packets, _int32(line)), mgpu.utils.thread_idx())
        offset = arith.addi(arith.muli(packet, _int32(PACKET)), _int32(HEADER))
        return arith.addi(mailbox, arith.extui(_i64(), offset))

    # What the table says is read before the first packet is sent: nothing moves across what sends and waits.
    devices = range(table.devices)
    there = [place(table.mailbox(device), table.rank) for device in devices]
    here = [place(table.own_mailbox, _int32(device)) for device in devices]
    is_own = [arith.cmpi(arith.CmpIPredicate.eq, table.rank, _int32(device)) for device in devices]
    for device in devices:
        for number, packet in enumerate(own):
            _send(there[device], number * step, packet, flag, unless=is_own[device])
    parts = []
    for device in devices:
        received = _received(here[device], step, len(own), flag, unless=is_own[device])
        parts.append([arith.select(is_own[device], *pair) for pair in zip(own, received, strict=True)])
    return parts


def _send(there: ir.Value, offset: int, packet: ir.Value, flag: ir.Value, *, unless: ir.Value) -> None:
    words = (llvm.extractelement(packet, _int32(word)) for word in range(_WORDS))
    store = f"""{{
        .reg .pred own;
        setp.ne.b32 own, $4, 0;
        @!own st.volatile.global.v4.b32 [$0 + {offset}], {{$1, $3, $2, $3}};
    }}"""
    mgpu.utils.inline_ptx(store, there, *words, flag, arith.extui(_i32(), unless))


def _received(here: ir.Value, step: int, number: int, flag: ir.Value, *, unless: ir.Value) -> list[ir.Value]:
    """The words of a device's packets, once all of them are there. All are asked for before one is waited for."""
    words, address, sought, own = _WORDS * number, *(f"${_WORDS * number + n}" for n in range(3))
    zeros = " ".join(f"mov.b32 ${word}, 0;" for word in range(words))
    loads = " ".join(
        f"ld.volatile.global.v4.b32 {{${2 * n}, flag{2 * n}, ${2 * n + 1}, flag{2 * n + 1}}}, [{address} + {n * step}];"
        for n in range(number)
    )
    others = " ".join(f"setp.ne.or.b32 again, flag{word}, {sought}, again;" for word in range(1, words))
    wait = f"""{{
        .reg .pred own, again, late;
        .reg .b32 looks, flag<{words}>;
        {zeros}
        mov.b32 looks, 0;
        setp.ne.b32 own, {own}, 0;
        @own bra there;
        look:
        {loads}
        add.u32 looks, looks, 1;
        setp.gt.u32 late, looks, {MOST_LOOKS};
        @late trap;
        setp.ne.b32 again, flag0, {sought};
        {others}
        @again bra look;
        there:
    }}"""
    operands = here, flag, arith.extui(_i32(), unless)
    out = mgpu.utils.inline_ptx(wait, *operands, result_types=[_i32()] * words, has_side_effects=True)
    return [_pair(*out[2 * n : 2 * n + 2]) for n in range(number)]


def _pair(first: ir.Value, second: ir.Value) -> ir.Value:
    pair = llvm.mlir_undef(ir.VectorType.get((_WORDS,), _i32()))
    for place, word in enumerate((first, second)):
        pair = llvm.insertelement(pair, word, _int32(place))
    return pair


def _sum_of(packets: Sequence[ir.Value], of_type: ir.Type) -> ir.Value:
    """Numbers of `of_type` added in float32, one packet after the other."""
    wide = ir.VectorType.get((NUMBERS,), ir.F32Type.get())
    total, *others = (arith.extf(wide, mgpu.utils.bitcast(packet, of_type)) for packet in packets)
    for other in others:
        total = arith.addf(total, other)
    return total


def _counter(table: _Table, program: ir.Value) -> ir.Value:
    """The address of this warp's count of sums."""
    warp = arith.shrui(mgpu.utils.thread_idx(), _int32(5))
    counter = arith.addi(arith.muli(program, _int32(MOST_WARPS)), warp)
    return arith.addi(table.own_mailbox, arith.extui(_i64(), arith.muli(counter, _int32(4))))


def _count(counter: ir.Value, flag: ir.Value) -> None:
    """Note that this warp has done with a sum. All its lanes have read the count by then."""
    store = """{
        .reg .pred first;
        .reg .b32 lane;
        mov.u32 lane, %laneid;
        setp.eq.b32 first, lane, 0;
        bar.warp.sync 0xffffffff;
        @first st.volatile.global.b32 [$0], $1;
    }"""
    mgpu.utils.inline_ptx(store, counter, flag, has_side_effects=True, convergent=True)


def _scalar(array: Any) -> ir.Value:
    return array.registers.item()


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _int32(value: int) -> ir.Value:
    return mgpu.utils.c(value, _i32())
