# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Kernels are Triton's language: their launch decides the types.
"""Triton kernels of the SSD scan's backward; names as in `triton_forward`.

With the states h before each chunk and their gradients' counterpart, the gradient E of the state
after it, a chunk's gradients need no other chunk. Matrices of scores are kept transposed, input
position j by output position i: then they multiply what they meet without moving between threads.
"""

import triton
import triton.language as tl

from mamba_dist.ops.ssd.triton_forward import from_start, raw_steps, tile, to_end


@triton.jit
def score_gradients(
    x,
    B,
    C,
    grad_y,
    steps,
    decays,
    numbers,
    scales,
    grad_scales,
    grad_B,
    grad_C,
    by_position,
    length,
    heads,
    groups,
    per_group,
    blocks,
    splits,
    units,
    parts,
    plane,
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    y_b,
    y_l,
    y_h,
    P: tl.constexpr,
    N: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
):
    """What passes inside one chunk, without a state, for `units` blocks of heads.

    `grad_B` and `grad_C` (B, L, G, parts, N) get sums over the units as part `split`. `by_position`
    (6, B, H, blocks, padded) gets the terms 0 to 3 of the gradients of decays and steps that
    `finish_steps` adds up.
    """
    split, chunk = tl.program_id(0) % splits, tl.program_id(0) // splits
    group, row = tl.program_id(1) % groups, (tl.program_id(1) // groups).to(tl.int64)
    chunks = tl.cdiv(length, Q)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    block_p = tl.arange(0, BLOCK_P)
    begin = (chunk * Q).to(tl.int64)
    positions = chunk * Q + q
    rows = positions < length
    B += row * B_b + begin * B_l + group * B_g
    C += row * C_b + begin * C_l + group * C_g
    together = q[:, None] <= q[None, :]
    if HAS_DOCUMENTS:
        number = tl.load(numbers + row * chunks * Q + positions)
        together = together & (number[:, None] == number[None, :])
    B_tile = tile(B, B_l, q, n, rows, N, BLOCK_N == N)
    C_tile = tile(C, C_l, q, n, rows, N, BLOCK_N == N)
    scores = tl.where(together, tl.dot(B_tile, tl.trans(C_tile), input_precision=PRECISION), 0.0)
    own = q[:, None] == q[None, :]
    own_scores = tl.sum(tl.where(own, scores, 0.0), axis=0)
    # A position's own term knows no decay; in sums over both ways it would leave its rounding.
    scores = tl.where(own, 0.0, scores)
    x += row * x_b + begin * x_l
    grad_y += row * y_b + begin * y_l
    grad_scores = tl.zeros((Q, Q), tl.float32)
    # Two bf16 tiles are multiplied as they are.
    SCALED: tl.constexpr = HALF and grad_y.dtype.element_ty == tl.float32
    stop = tl.minimum((split + 1) * units, per_group * blocks)
    for unit_of_group in range(split * units, stop):
        unit = group * per_group * blocks + unit_of_group
        head = unit // blocks
        p = (unit % blocks) * BLOCK_P + block_p
        x_tile = tile(x + head * x_h, x_l, q, p, rows, P, P % BLOCK_P == 0)
        grad = tile(grad_y + head * y_h, y_l, q, p, rows, P, P % BLOCK_P == 0)
        of_unit = row * heads * blocks + unit
        of_head = (row * heads + head) * chunks * Q + chunk * Q
        step = tl.load(steps + of_head + q)
        decay = tl.load(decays + of_head + q)
        at = by_position + of_unit * chunks * Q + positions
        own_products = tl.sum(x_tile.to(tl.float32) * grad.to(tl.float32), axis=1)
        size = 1.0
        if SCALED:
            # bf16 numbers in fp16's range are fp16 numbers.
            x_scale = tl.load(scales + 2 * (of_unit * chunks + chunk))
            grad_scale = tl.load(grad_scales + 2 * (of_unit * chunks + chunk))
            size = x_scale * grad_scale
            x_tile = (x_tile.to(tl.float32) * (1.0 / x_scale)).to(tl.float16)
            grad = (grad.to(tl.float32) * (1.0 / grad_scale)).to(tl.float16)
        products = tl.dot(x_tile, tl.trans(grad), input_precision=PRECISION)
        between = tl.exp2((decay[None, :] - decay[:, None]).to(tl.float32))
        products = tl.where(together, products * between, 0.0)
        stepped = products * (step * size)[:, None]
        grad_scores += stepped
        tl.store(at, tl.sum(stepped * scores, axis=0))
        tl.store(at + plane, tl.sum(products * scores, axis=1) * size)
        tl.store(at + 2 * plane, own_products * own_scores)
        tl.store(at + 3 * plane, own_products)

    narrow = grad_scores.to(B_tile.dtype)
    sum_B = tl.dot(narrow, C_tile, input_precision=PRECISION)
    sum_C = tl.dot(tl.trans(narrow), B_tile, input_precision=PRECISION)
    if narrow.dtype == tl.bfloat16:
        # Once for all the heads, so the digits that bf16 lacks cost next to nothing.
        rest = (grad_scores - narrow.to(tl.float32)).to(narrow.dtype)
        sum_B = tl.dot(rest, C_tile, acc=sum_B)
        sum_C = tl.dot(tl.trans(rest), B_tile, acc=sum_C)
    place = (row * length + begin) * (groups * parts * N) + (group * parts + split) * N
    place += q[:, None] * (groups * parts * N) + n[None, :]
    exists = rows[:, None] & (n < N)[None, :]
    tl.store(grad_B + place, sum_B, mask=exists)
    tl.store(grad_C + place, sum_C, mask=exists)


@triton.jit
def state_gradients(
    values,
    vectors,
    steps,
    decays,
    numbers,
    states,
    scales,
    others,
    other_scales,
    sums,
    by_position,
    by_chunk,
    length,
    heads,
    groups,
    per_group,
    blocks,
    splits,
    units,
    parts,
    first_part,
    values_b,
    values_l,
    values_h,
    vectors_b,
    vectors_l,
    vectors_g,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
):
    """What passes through the state before one chunk, or after it, for `units` blocks of heads.

    REVERSE, `values` x met `vectors` B in the state after the chunk, whose gradient is `states`;
    the `others` are then the states, and `by_chunk` (B, H, blocks, chunks) gets what passes from
    one to the other. Else `values`, the output's gradient, meets `vectors` C in the state before
    the chunk. `sums` (B, L, G, parts, N), the gradient of B or C, gets a sum over the units as part
    `first_part + split`, and `by_position` (B, H, blocks, padded) a term of the decays' gradients.
    HALF, the states are fp16 over scales, as `store_state` keeps them.
    """
    split, chunk = tl.program_id(0) % splits, tl.program_id(0) // splits
    group, row = tl.program_id(1) % groups, (tl.program_id(1) // groups).to(tl.int64)
    chunks = tl.cdiv(length, Q)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    block_p = tl.arange(0, BLOCK_P)
    begin = (chunk * Q).to(tl.int64)
    positions = chunk * Q + q
    rows = positions < length
    vectors += row * vectors_b + begin * vectors_l + group * vectors_g
    vector = tile(vectors, vectors_l, q, n, rows, N, BLOCK_N == N)
    number, last_number = 0, 0
    if HAS_DOCUMENTS:
        number = tl.load(numbers + row * chunks * Q + positions)
        last_number = tl.load(numbers + row * chunks * Q + chunk * Q + Q - 1)
    values += row * values_b + begin * values_l
    inner = block_p[:, None] * BLOCK_N + n[None, :]
    total = tl.zeros((Q, BLOCK_N), tl.float32)
    stop = tl.minimum((split + 1) * units, per_group * blocks)
    for unit_of_group in range(split * units, stop):
        unit = group * per_group * blocks + unit_of_group
        head = unit // blocks
        p = (unit % blocks) * BLOCK_P + block_p
        value = tile(values + head * values_h, values_l, q, p, rows, P, P % BLOCK_P == 0)
        of_unit = row * heads * blocks + unit
        place = of_unit * chunks + chunk
        state = tl.load(states + place * (BLOCK_P * BLOCK_N) + inner)
        of_head = (row * heads + head) * chunks * Q + chunk * Q
        decay = tl.load(decays + of_head + q)
        last_decay = tl.load(decays + of_head + Q - 1)
        size = 1.0
        if HALF:
            # bf16 numbers in fp16's range are fp16 numbers.
            value_scale = tl.load(other_scales + 2 * place)
            value = (value.to(tl.float32) * (1.0 / value_scale)).to(tl.float16)
            size = value_scale * tl.load(scales + 2 * place + 1)
        if REVERSE:
            weight = to_end(decay, number, last_decay, last_number, HAS_DOCUMENTS) * size
            other = tl.load(others + place * (BLOCK_P * BLOCK_N) + inner)
            through = tl.sum(tl.sum(state.to(tl.float32) * other.to(tl.float32), axis=1), axis=0)
            if HALF:
                through *= tl.load(scales + 2 * place + 1) * tl.load(other_scales + 2 * place + 1)
            through *= from_start(last_decay, last_number, HAS_DOCUMENTS)
            tl.store(by_chunk + place, through)
        else:
            weight = from_start(decay, number, HAS_DOCUMENTS) * size
        given = tl.dot(value, state, input_precision=PRECISION)
        term = tl.sum(given * vector.to(tl.float32), axis=1) * weight
        tl.store(by_position + of_unit * chunks * Q + positions, term)
        if REVERSE:
            weight *= tl.load(steps + of_head + q)
        total += given * weight[:, None]
    place = (row * length + begin) * (groups * parts * N) + (group * parts + first_part + split) * N
    place += q[:, None] * (groups * parts * N) + n[None, :]
    tl.store(sums + place, total, mask=rows[:, None] & (n < N)[None, :])


@triton.jit
def finish_steps(
    dt,
    bias,
    A,
    steps,
    numbers,
    by_position,
    by_chunk,
    grad_dt,
    sums,
    length,
    heads,
    blocks,
    chunks,
    plane,
    sums_plane,
    dt_b,
    dt_l,
    dt_h,
    grad_dt_b,
    grad_dt_l,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of dt (B, L, H) and the parts `sums` (3, B, H, chunks) of A's, the bias's, D's.

    A decay at t scales what passes from a position before t to one at or after it. Inside the chunk
    those are the sums by output less the sums by input from t on, which cancel in fp32 only: the
    terms of both come from the same products.
    """
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    positions = chunk * Q + q
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = head < heads
    some = real[None, :] & (q >= 0)[:, None]
    exists = (positions < length)[:, None] & real[None, :]
    sent = tl.zeros((Q, HEADS), tl.float32)
    received = tl.zeros((Q, HEADS), tl.float32)
    own = tl.zeros((Q, HEADS), tl.float32)
    left = tl.zeros((Q, HEADS), tl.float32)
    skipped = tl.zeros((Q, HEADS), tl.float32)
    passed = tl.zeros((HEADS,), tl.float32)
    for block in range(blocks):
        of_unit = (row * heads + head) * blocks + block
        at = by_position + (of_unit * chunks * Q)[None, :] + positions[:, None]
        sent += tl.load(at, mask=some, other=0.0)
        sent += tl.load(at + 5 * plane, mask=some, other=0.0)
        received += tl.load(at + plane, mask=some, other=0.0)
        own += tl.load(at + 2 * plane, mask=some, other=0.0)
        skipped += tl.load(at + 3 * plane, mask=some, other=0.0)
        left += tl.load(at + 4 * plane, mask=some, other=0.0)
        passed += tl.load(by_chunk + of_unit * chunks + chunk, mask=real, other=0.0)
    of_head = ((row * heads + head) * chunks * Q)[None, :] + positions[:, None]
    step = tl.load(steps + of_head, mask=some, other=0.0)
    earlier = q[:, None] > q[None, :]
    later = q[:, None] <= q[None, :]
    if HAS_DOCUMENTS:
        number = tl.load(numbers + row * chunks * Q + positions)
        same = number[:, None] == number[None, :]
        earlier = earlier & same
        later = later & same
    # Sums over positions, as products with zeros and ones: for all heads at once, in full fp32.
    grad_decay = tl.dot(
        later.to(tl.float32), sent - step * received, input_precision="ieee"
    ) + tl.dot(earlier.to(tl.float32), step * left, input_precision="ieee")
    grad_decay += passed[None, :]
    if HAS_DOCUMENTS:
        # What comes to a document's first position is zero, whatever its decay.
        before = tl.load(numbers + row * chunks * Q + positions - 1, mask=q > 0, other=0)
        grad_decay = tl.where((number == before)[:, None], grad_decay, 0.0)
    rate = tl.load(A + head, mask=real, other=0.0)
    grad = grad_decay * rate[None, :] + received + own + left
    if SOFTPLUS:
        raw = raw_steps(dt + row * dt_b, bias, positions, head, exists, dt_l, dt_h, HAS_BIAS)
        grad *= tl.sigmoid(raw)
    out = row * grad_dt_b + (positions.to(tl.int64) * grad_dt_l)[:, None] + head[None, :]
    tl.store(grad_dt + out, grad.to(grad_dt.dtype.element_ty), mask=exists)
    place = sums + (row * heads + head) * chunks + chunk
    tl.store(place, tl.sum(tl.where(exists, step * grad_decay, 0.0), axis=0), mask=real)
    tl.store(place + sums_plane, tl.sum(tl.where(exists, grad, 0.0), axis=0), mask=real)
    tl.store(place + 2 * sums_plane, tl.sum(skipped, axis=0), mask=real)
