# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Kernels are Triton's language: their launch decides the types.
"""Triton kernels of the SSD scan's forward: arXiv 2405.21060, section 6, a chunk at a time.

B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk. A chunk's "decays" are log2 of
the decay from the start of the chunk, or of the document where that is later, up to each position;
its "numbers" count the documents that started in it so far. Only positions of one document, that
is of one number, are ever subtracted or multiplied, so that no decay crosses a document's start.

A program that carries a state has BLOCK_P rows of one head's, an independent problem; there are
`blocks` of them to a head. Offsets of rows and heads are 64-bit; those inside a tile are 32-bit.
"""

import triton
import triton.language as tl


@triton.jit
def _stable_softplus(raw):
    """log(1 + exp(raw)) of fp64, with all its digits for a very negative `raw` too."""
    power = tl.exp(-tl.abs(raw))
    near_one = 1.0 + power
    # Kahan's log1p: the rounding error of 1 + power is in both factors and divides out.
    spread = tl.where(near_one == 1.0, 1.0, near_one - 1.0)
    log1p = tl.where(near_one == 1.0, power, tl.log(near_one) * (power / spread))
    return tl.maximum(raw, 0.0) + log1p


@triton.jit
def raw_steps(dt, bias, positions, head, exists, dt_l, dt_h, HAS_BIAS: tl.constexpr):
    """Steps (Q, heads) before softplus in fp32; `dt` points at the row's first one."""
    offsets = positions.to(tl.int64)[:, None] * dt_l + head.to(tl.int64)[None, :] * dt_h
    raw = tl.load(dt + offsets, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + head[None, :] + 0 * positions[:, None], mask=exists, other=0.0)
    return raw


@triton.jit
def prepare_steps(
    dt,
    bias,
    A,
    seq_idx,
    steps,
    decays,
    numbers,
    length,
    heads,
    padded,
    dt_b,
    dt_l,
    dt_h,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Steps and decays (B, H, padded) and numbers (B, padded) of one row, chunk and HEADS heads.

    Positions from `length` on get a step of 0, which leaves a state as it is.
    """
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    positions = tl.program_id(0) * Q + q
    real = head < heads
    exists = (positions < length)[:, None] & real[None, :]
    raw = raw_steps(dt + row * dt_b, bias, positions, head, exists, dt_l, dt_h, HAS_BIAS)
    raw = raw.to(tl.float64)
    step = _stable_softplus(raw) if SOFTPLUS else raw
    step = tl.where(exists, step, 0.0).to(tl.float32)
    # fp64: a difference of two sums then has fp32's full precision.
    rate = tl.load(A + head, mask=real, other=0.0).to(tl.float64) * 1.4426950408889634
    decay = tl.cumsum(step.to(tl.float64) * rate[None, :], 0)
    if HAS_DOCUMENTS:
        ids = seq_idx + row * length + positions
        inside = (positions < length) & (positions > 0)
        current = tl.load(ids, mask=inside, other=0)
        starts = current != tl.load(ids - 1, mask=inside, other=0)
        number = tl.cumsum(starts.to(tl.int32), 0)
        # All programs of a chunk write the same.
        tl.store(numbers + row * padded + positions, number)
        # Less what came before the document: rounded to fp32, that would cost digits. The product
        # picks a row, exactly, in two halves of fp64.
        begin = tl.min(tl.where(number[:, None] == number[None, :], q[None, :], Q), axis=1)
        picked = ((begin[:, None] == q[None, :]) & (number > 0)[:, None]).to(tl.float32)
        high = decay.to(tl.float32)
        low = (decay - high.to(tl.float64)).to(tl.float32)
        decay -= tl.dot(picked, high, input_precision="ieee").to(tl.float64)
        decay -= tl.dot(picked, low, input_precision="ieee").to(tl.float64)
    out = (row * heads + head)[None, :] * padded + positions[:, None]
    tl.store(steps + out, step, mask=real[None, :])
    tl.store(decays + out, decay.to(decays.dtype.element_ty), mask=real[None, :])


@triton.jit
def tile(first, stride, q, columns, rows, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """The entries (q, columns) from `first` on; 0 where the row, or the column, does not exist."""
    # One 64-bit pointer and 32-bit offsets: a pointer to each entry would take twice the registers.
    pointers = first + (q[:, None] * stride + columns[None, :])
    if EXACT:
        return tl.load(pointers, mask=rows[:, None], other=0.0)
    return tl.load(pointers, mask=rows[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def from_start(decay, number, HAS_DOCUMENTS: tl.constexpr):
    """(Q,) decay of the state before the chunk down to each position; 0 past a document's start."""
    factor = tl.exp2(decay.to(tl.float32))
    if HAS_DOCUMENTS:
        factor = tl.where(number == 0, factor, 0.0)
    return factor


@triton.jit
def to_end(decay, number, last_decay, last_number, HAS_DOCUMENTS: tl.constexpr):
    """(Q,) decay of each position's inflow down to the chunk's end; 0 if its document ended."""
    factor = tl.exp2((last_decay - decay).to(tl.float32))
    if HAS_DOCUMENTS:
        factor = tl.where(number == last_number, factor, 0.0)
    return factor


@triton.jit
def largest_entry(values):
    """The largest magnitude in a tile."""
    return tl.max(tl.max(tl.abs(values.to(tl.float32)), axis=1), axis=0)


@triton.jit
def half_scale(bound):
    """A power of two and its inverse, which brings entries up to `bound` below 2^15.

    That is the upper end of fp16's range: entries down to 2^-29 of it keep all of fp16's digits.
    NaN where there is no bound.
    """
    bits = bound.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.maximum(bits, 40 << 23) - (14 << 23)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    scale = tl.where(bound < float("inf"), bits.to(tl.float32, bitcast=True), float("nan"))
    return scale, inverse


@triton.jit
def next_scale(bound, scale, kept, size, reach, weight):
    """The next state's bound and scale; `kept` and `weight` such that the state comes over it.

    `size` and `reach` are the largest magnitudes of the chunk's two factors.
    """
    bound = bound * kept + size * reach * tl.sum(tl.abs(weight), axis=0)
    following, inverse = half_scale(bound)
    # In this order: 0 times the scales' ratio, which may overflow, would be NaN.
    return bound, following, kept * scale * inverse, weight * inverse


@triton.jit
def store_state(state, scale, size, states, scales, place, SCALED: tl.constexpr):
    """Keeps a chunk's state as number `place`: in fp32, or in fp16 over `scale`.

    `scales` (..., 2) gets a scale for the chunk's values, all of them up to `size`, and `scale`.
    The products of two states cancel in their sum, where bf16's few digits would not do.
    """
    if SCALED:
        of_values, _ = half_scale(size)
        tl.store(scales + 2 * place, of_values)
        tl.store(scales + 2 * place + 1, scale)
    states += place * (state.shape[0] * state.shape[1])
    p, n = tl.arange(0, state.shape[0]), tl.arange(0, state.shape[1])
    pointers = states + (p[:, None] * state.shape[1] + n[None, :])
    tl.store(pointers, state.to(states.dtype.element_ty))


@triton.jit
def scan_chunks(
    values,
    written,
    read,
    D,
    steps,
    decays,
    numbers,
    start,
    out,
    chunk_states,
    scales,
    ends,
    length,
    heads,
    per_group,
    blocks,
    segments,
    segment_chunks,
    values_b,
    values_l,
    values_h,
    written_b,
    written_l,
    written_g,
    read_b,
    read_l,
    read_g,
    out_b,
    out_l,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    STORE_CHUNKS: tl.constexpr,
    STORE_END: tl.constexpr,
    HALF: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scan of one row, BLOCK_P of a head and segment of chunks, or its transpose from the end.

    Forward, `values` x are written to the state along B, and read from it along C as `out` y.
    REVERSE, the gradients of y are written along C and read along B as x's; the steps then scale
    what is read. `start` (B, H, segments, P, N) has the states before the segments, `ends`
    (B, H, P, N) gets the one past them all, and `chunk_states` (B, H, blocks, chunks, BLOCK_P,
    BLOCK_N) what the state is on coming to each chunk, as `store_state` keeps it. `values` may be
    fp32 with the others bf16. HALF, the state is held over a scale that leads it into fp16's range:
    a power of two, which rounds nothing.
    """
    segment = tl.program_id(0) // (heads * blocks)
    unit = tl.program_id(0) % (heads * blocks)
    head, row = unit // blocks, tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(length, Q)
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    block_p = tl.arange(0, BLOCK_P)
    p = (unit % blocks) * BLOCK_P + block_p
    begin = ((last - 1 if REVERSE else first) * Q).to(tl.int64)
    values += row * values_b + begin * values_l + head * values_h
    written += row * written_b + begin * written_l + (head // per_group) * written_g
    read += row * read_b + begin * read_l + (head // per_group) * read_g
    out += row * out_b + begin * out_l + head * P
    by_position = (row * heads + head) * chunks * Q
    numbered = row * chunks * Q
    inner = p[:, None] * N + n[None, :]
    exists = (p[:, None] < P) & (n[None, :] < N)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_START:
        begins = start + ((row * heads + head) * segments + segment) * P * N
        state = tl.load(begins + inner, mask=exists, other=0.0)
    skip = tl.load(D + head) if HAS_D else 0.0
    own = q[:, None] == q[None, :]
    SCALED: tl.constexpr = HALF and STORE_CHUNKS
    if SCALED:
        bound = largest_entry(state)
        scale, inverse = half_scale(bound)
        state *= inverse
    else:
        scale = 1.0
    for count in range(last - first):
        chunk = last - 1 - count if REVERSE else first + count
        rows = chunk * Q + q < length
        value = tile(values, values_l, q, p, rows, P, P % BLOCK_P == 0)
        writer = tile(written, written_l, q, n, rows, N, BLOCK_N == N)
        reader = tile(read, read_l, q, n, rows, N, BLOCK_N == N)
        step = tl.load(steps + by_position + chunk * Q + q)
        decay = tl.load(decays + by_position + chunk * Q + q)
        last_decay = tl.load(decays + by_position + chunk * Q + Q - 1)
        together = q[:, None] < q[None, :] if REVERSE else q[:, None] > q[None, :]
        number, last_number = 0, 0
        if HAS_DOCUMENTS:
            number = tl.load(numbers + numbered + chunk * Q + q)
            last_number = tl.load(numbers + numbered + chunk * Q + Q - 1)
            together = together & (number[:, None] == number[None, :])
        if STORE_CHUNKS:
            place = (row * heads * blocks + unit) * chunks + chunk
            size = largest_entry(value) if SCALED else 0.0
            store_state(state, scale, size, chunk_states, scales, place, SCALED)
        entering = from_start(decay, number, HAS_DOCUMENTS)
        leaving = to_end(decay, number, last_decay, last_number, HAS_DOCUMENTS)
        scores = tl.dot(reader, tl.trans(writer), input_precision=PRECISION)
        if REVERSE:
            between = decay[None, :] - decay[:, None]
        else:
            between = decay[:, None] - decay[None, :]
            scores *= step[None, :]
        mixing = tl.where(together, scores * tl.exp2(between.to(tl.float32)), 0.0)
        result = tl.dot(reader, tl.trans(state.to(reader.dtype)), input_precision=PRECISION)
        result *= (scale * (leaving if REVERSE else entering))[:, None]
        mixing, narrow = mixing.to(reader.dtype), value.to(reader.dtype)
        result = tl.dot(mixing, narrow, acc=result, input_precision=PRECISION)
        wide = value.to(tl.float32)
        # A position's own term is often the largest, and is not rounded, as the skip is not.
        own_score = tl.sum(tl.where(own, scores, 0.0), axis=1)
        if REVERSE:
            result *= step[:, None]
            own_score *= step
        result += (own_score + skip)[:, None] * wide
        tl.store(
            out + (q[:, None] * out_l + p[None, :]),
            result.to(out.dtype.element_ty),
            mask=rows[:, None] & (p < P)[None, :],
        )
        weight = entering if REVERSE else step * leaving
        kept = from_start(last_decay, last_number, HAS_DOCUMENTS)
        if SCALED:
            reach = largest_entry(writer)
            bound, scale, kept, weight = next_scale(bound, scale, kept, size, reach, weight)
        weighted = tl.trans((wide * weight[:, None]).to(writer.dtype))
        state *= kept
        state = tl.dot(weighted, writer, acc=state, input_precision=PRECISION)
        move = -Q if REVERSE else Q
        values += move * values_l
        written += move * written_l
        read += move * read_l
        out += move * out_l
    if STORE_END and segment == (0 if REVERSE else segments - 1):
        tl.store(ends + (row * heads + head) * P * N + inner, state * scale, mask=exists)


@triton.jit
def carry_states(
    values,
    vectors,
    steps,
    decays,
    numbers,
    start,
    chunk_states,
    scales,
    ends,
    length,
    heads,
    per_group,
    blocks,
    segments,
    segment_chunks,
    values_b,
    values_l,
    values_h,
    vectors_b,
    vectors_l,
    vectors_g,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    STORE_CHUNKS: tl.constexpr,
    STORE_ENDS: tl.constexpr,
    HALF: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state carried over a segment's chunks, for one row and BLOCK_P of a head.

    Forward, the states of the scan: `values` x, `vectors` B. REVERSE, their gradients: `values`
    the output's gradient, `vectors` C. `chunk_states` (B, H, blocks, chunks, BLOCK_P, BLOCK_N) gets
    what the state is on coming to each chunk, as `store_state` keeps it, `ends` (B, H, segments, P,
    N) what it is on leaving the segment.
    """
    segment = tl.program_id(0) // (heads * blocks)
    unit = tl.program_id(0) % (heads * blocks)
    head, row = unit // blocks, tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(length, Q)
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    block_p = tl.arange(0, BLOCK_P)
    p = (unit % blocks) * BLOCK_P + block_p
    begin = ((last - 1 if REVERSE else first) * Q).to(tl.int64)
    values += row * values_b + begin * values_l + head * values_h
    vectors += row * vectors_b + begin * vectors_l + (head // per_group) * vectors_g
    by_position = (row * heads + head) * chunks * Q
    numbered = row * chunks * Q
    by_chunk = (row * heads * blocks + unit) * chunks
    inner = p[:, None] * N + n[None, :]
    exists = (p[:, None] < P) & (n[None, :] < N)
    outer = ((row * heads + head) * segments + segment) * P * N
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_START:
        state = tl.load(start + outer + inner, mask=exists, other=0.0)
    SCALED: tl.constexpr = HALF and STORE_CHUNKS
    if SCALED:
        bound = largest_entry(state)
        scale, inverse = half_scale(bound)
        state *= inverse
    else:
        scale = 1.0
    for count in range(last - first):
        chunk = last - 1 - count if REVERSE else first + count
        positions = chunk * Q + q
        rows = positions < length
        value = tile(values, values_l, q, p, rows, P, P % BLOCK_P == 0)
        vector = tile(vectors, vectors_l, q, n, rows, N, BLOCK_N == N)
        decay = tl.load(decays + by_position + positions)
        last_decay = tl.load(decays + by_position + chunk * Q + Q - 1)
        number, last_number = 0, 0
        if HAS_DOCUMENTS:
            number = tl.load(numbers + numbered + positions)
            last_number = tl.load(numbers + numbered + chunk * Q + Q - 1)
        if REVERSE:
            weight = from_start(decay, number, HAS_DOCUMENTS)
        else:
            weight = to_end(decay, number, last_decay, last_number, HAS_DOCUMENTS)
            weight *= tl.load(steps + by_position + positions)
        if STORE_CHUNKS:
            place = by_chunk + chunk
            size = largest_entry(value) if SCALED else 0.0
            store_state(state, scale, size, chunk_states, scales, place, SCALED)
        kept = from_start(last_decay, last_number, HAS_DOCUMENTS)
        if SCALED:
            reach = largest_entry(vector)
            bound, scale, kept, weight = next_scale(bound, scale, kept, size, reach, weight)
        weighted = (value.to(tl.float32) * weight[:, None]).to(vector.dtype)
        state *= kept
        state = tl.dot(tl.trans(weighted), vector, acc=state, input_precision=PRECISION)
        if REVERSE:
            values -= Q * values_l
            vectors -= Q * vectors_l
        else:
            values += Q * values_l
            vectors += Q * vectors_l
    if STORE_ENDS:
        tl.store(ends + outer + inner, state * scale, mask=exists)


@triton.jit
def pass_states(
    local,
    initial,
    starts,
    decays,
    numbers,
    heads,
    chunks,
    segments,
    segment_chunks,
    size,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`starts` (B, H, segments, size), the states that segments come to.

    `local` (B, H, segments, size) is what each segment makes of a zero state.
    """
    of_head = tl.program_id(1).to(tl.int64)
    inner = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = inner < size
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + of_head * size + inner, mask=exists, other=0.0)
    for count in range(segments):
        segment = segments - 1 - count if REVERSE else count
        place = (of_head * segments + segment) * size + inner
        tl.store(starts + place, state, mask=exists)
        decay = 1.0
        first = segment * segment_chunks
        for chunk in range(first, tl.minimum(first + segment_chunks, chunks)):
            at_end = chunk * Q + Q - 1
            last_decay = tl.load(decays + of_head * chunks * Q + at_end)
            last_number = 0
            if HAS_DOCUMENTS:
                last_number = tl.load(numbers + (of_head // heads) * chunks * Q + at_end)
            decay *= from_start(last_decay, last_number, HAS_DOCUMENTS)
        state = decay * state + tl.load(local + place, mask=exists, other=0.0)
