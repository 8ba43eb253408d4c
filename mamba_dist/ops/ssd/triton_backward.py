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
def chunk_gradients(
    x,
    B,
    C,
    grad_y,
    steps,
    decays,
    numbers,
    states,
    scales,
    grad_states,
    grad_scales,
    grad_B,
    grad_C,
    by_position,
    by_chunk,
    length,
    heads,
    groups,
    per_group,
    blocks,
    splits,
    units,
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
    """The gradients of B and C for one chunk, summed over `units` blocks of heads.

    `grad_B` and `grad_C` (B, L, G, splits, N) get the sums. `by_position` (6, B, H, blocks, padded)
    gets the terms of the gradients of decays and steps that `finish_steps` adds up, `by_chunk`
    (B, H, blocks, chunks) what the state that passes through the chunk gives to each decay. HALF,
    the states are fp16 over scales, as `store_state` keeps them.
    """
    split, chunk = tl.program_id(0) % splits, tl.program_id(0) // splits
    group, row = tl.program_id(1) % groups, (tl.program_id(1) // groups).to(tl.int64)
    chunks = tl.cdiv(length, Q)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    block_p = tl.arange(0, BLOCK_P)
    begin = (chunk * Q).to(tl.int64)
    positions = chunk * Q + q
    rows = positions < length
    B_tile = tile(B + row * B_b + begin * B_l + group * B_g, B_l, q, n, rows, N, BLOCK_N == N)
    C_tile = tile(C + row * C_b + begin * C_l + group * C_g, C_l, q, n, rows, N, BLOCK_N == N)
    together = q[:, None] <= q[None, :]
    number, last_number = 0, 0
    if HAS_DOCUMENTS:
        number = tl.load(numbers + row * chunks * Q + positions)
        last_number = tl.load(numbers + row * chunks * Q + chunk * Q + Q - 1)
        together = together & (number[:, None] == number[None, :])
    scores = tl.where(together, tl.dot(B_tile, tl.trans(C_tile), input_precision=PRECISION), 0.0)
    own = q[:, None] == q[None, :]
    own_scores = tl.sum(tl.where(own, scores, 0.0), axis=0)
    # A position's own term knows no decay; in sums over both ways it would leave its rounding.
    scores = tl.where(own, 0.0, scores)
    x += row * x_b + begin * x_l
    grad_y += row * y_b + begin * y_l
    grad_scores = tl.zeros((Q, Q), tl.float32)
    sum_B = tl.zeros((Q, BLOCK_N), tl.float32)
    sum_C = tl.zeros((Q, BLOCK_N), tl.float32)
    stop = tl.minimum((split + 1) * units, per_group * blocks)
    for unit_of_group in range(split * units, stop):
        unit = group * per_group * blocks + unit_of_group
        head = unit // blocks
        p = (unit % blocks) * BLOCK_P + block_p
        x_tile = tile(x + head * x_h, x_l, q, p, rows, P, P % BLOCK_P == 0)
        grad = tile(grad_y + head * y_h, y_l, q, p, rows, P, P % BLOCK_P == 0)
        of_unit = row * heads * blocks + unit
        place = of_unit * chunks + chunk
        inner = block_p[:, None] * BLOCK_N + n[None, :]
        state = tl.load(states + place * (BLOCK_P * BLOCK_N) + inner)
        grad_state = tl.load(grad_states + place * (BLOCK_P * BLOCK_N) + inner)
        of_head = (row * heads + head) * chunks * Q + chunk * Q
        step = tl.load(steps + of_head + q)
        decay = tl.load(decays + of_head + q)
        last_decay = tl.load(decays + of_head + Q - 1)
        at = by_position + of_unit * chunks * Q + positions
        own_products = tl.sum(x_tile.to(tl.float32) * grad.to(tl.float32), axis=1)
        x_scale, state_scale, grad_scale, grad_state_scale = 1.0, 1.0, 1.0, 1.0
        if HALF:
            # bf16 numbers in fp16's range are fp16 numbers.
            x_scale, state_scale = tl.load(scales + 2 * place), tl.load(scales + 2 * place + 1)
            grad_scale = tl.load(grad_scales + 2 * place)
            grad_state_scale = tl.load(grad_scales + 2 * place + 1)
            x_tile = (x_tile.to(tl.float32) * (1.0 / x_scale)).to(tl.float16)
            grad = (grad.to(tl.float32) * (1.0 / grad_scale)).to(tl.float16)

        # From the state before the chunk to the one after it.
        through = tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), axis=1)
        through = tl.sum(through, axis=0) * state_scale * grad_state_scale
        through *= from_start(last_decay, last_number, HAS_DOCUMENTS)
        tl.store(by_chunk + of_unit * chunks + chunk, through)

        # Inside the chunk.
        products = tl.dot(x_tile, tl.trans(grad), input_precision=PRECISION)
        between = tl.exp2((decay[None, :] - decay[:, None]).to(tl.float32))
        products = tl.where(together, products * between, 0.0)
        size = x_scale * grad_scale
        stepped = products * (step * size)[:, None]
        grad_scores += stepped
        tl.store(at, tl.sum(stepped * scores, axis=0))
        tl.store(at + plane, tl.sum(products * scores, axis=1) * size)
        tl.store(at + 2 * plane, own_products * own_scores)
        tl.store(at + 3 * plane, own_products)

        # Through the state after the chunk.
        leaving = to_end(decay, number, last_decay, last_number, HAS_DOCUMENTS)
        leaving *= x_scale * grad_state_scale
        given = tl.dot(x_tile, grad_state, input_precision=PRECISION)
        tl.store(at + 4 * plane, tl.sum(given * B_tile.to(tl.float32), axis=1) * leaving)
        sum_B += given * (leaving * step)[:, None]

        # Through the state before the chunk.
        entering = from_start(decay, number, HAS_DOCUMENTS) * (grad_scale * state_scale)
        taken = tl.dot(grad, state, input_precision=PRECISION)
        tl.store(at + 5 * plane, tl.sum(taken * C_tile.to(tl.float32), axis=1) * entering)
        sum_C += taken * entering[:, None]

    narrow = grad_scores.to(B_tile.dtype)
    sum_B = tl.dot(narrow, C_tile, acc=sum_B, input_precision=PRECISION)
    sum_C = tl.dot(tl.trans(narrow), B_tile, acc=sum_C, input_precision=PRECISION)
    if narrow.dtype == tl.bfloat16:
        # Once for all the heads, so the digits that bf16 lacks cost next to nothing.
        rest = (grad_scores - narrow.to(tl.float32)).to(narrow.dtype)
        sum_B = tl.dot(rest, C_tile, acc=sum_B)
        sum_C = tl.dot(tl.trans(rest), B_tile, acc=sum_C)
    sum_l = groups * splits * N
    place = (row * length + begin) * sum_l + (group * splits + split) * N
    place += q[:, None] * sum_l + n[None, :]
    exists = rows[:, None] & (n < N)[None, :]
    tl.store(grad_B + place, sum_B, mask=exists)
    tl.store(grad_C + place, sum_C, mask=exists)


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
):
    """The gradient of dt (B, L, H) and the parts `sums` (3, B, H, chunks) of A's, the bias's, D's.

    A decay at t scales what passes from a position before t to one at or after it. Inside the chunk
    those are the sums by output less the sums by input from t on, which cancel in fp32 only: the
    terms of both come from the same products.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    positions = chunk * Q + q
    valid = positions < length
    sent = tl.zeros((Q,), tl.float32)
    received = tl.zeros((Q,), tl.float32)
    own = tl.zeros((Q,), tl.float32)
    left = tl.zeros((Q,), tl.float32)
    skipped = tl.zeros((Q,), tl.float32)
    passed = 0.0
    for block in range(blocks):
        of_unit = (row * heads + head) * blocks + block
        at = by_position + of_unit * chunks * Q + positions
        sent += tl.load(at) + tl.load(at + 5 * plane)
        received += tl.load(at + plane)
        own += tl.load(at + 2 * plane)
        skipped += tl.load(at + 3 * plane)
        left += tl.load(at + 4 * plane)
        passed += tl.load(by_chunk + of_unit * chunks + chunk)
    step = tl.load(steps + (row * heads + head) * chunks * Q + positions)
    later = q[:, None] <= q[None, :]
    if HAS_DOCUMENTS:
        number = tl.load(numbers + row * chunks * Q + positions)
        same = number[:, None] == number[None, :]
        following = tl.where(same & later, (sent - step * received)[None, :], 0.0)
        preceding = tl.where(same & (q[:, None] > q[None, :]), (step * left)[None, :], 0.0)
    else:
        following = tl.where(later, (sent - step * received)[None, :], 0.0)
        preceding = tl.where(later, 0.0, (step * left)[None, :])
    grad_decay = tl.sum(following, axis=1) + tl.sum(preceding, axis=1) + passed
    if HAS_DOCUMENTS:
        # What comes to a document's first position is zero, whatever its decay.
        before = tl.load(numbers + row * chunks * Q + positions - 1, mask=q > 0, other=0)
        grad_decay = tl.where(number == before, grad_decay, 0.0)
    grad = grad_decay * tl.load(A + head) + received + own + left
    if SOFTPLUS:
        raw = raw_steps(dt + row * dt_b + head * dt_h, bias, head, positions, valid, dt_l, HAS_BIAS)
        grad *= tl.sigmoid(raw)
    out = row * grad_dt_b + positions.to(tl.int64) * grad_dt_l + head
    tl.store(grad_dt + out, grad.to(grad_dt.dtype.element_ty), mask=valid)
    place = sums + (row * heads + head) * chunks + chunk
    tl.store(place, tl.sum(tl.where(valid, step * grad_decay, 0.0), axis=0))
    tl.store(place + sums_plane, tl.sum(tl.where(valid, grad, 0.0), axis=0))
    tl.store(place + 2 * sums_plane, tl.sum(skipped, axis=0))
