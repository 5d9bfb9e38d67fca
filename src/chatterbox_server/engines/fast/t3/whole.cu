// All layers of T3's step in one launch, for M rows: Llama, bfloat16. `whole.py` compiles it and says for whom.
//
// A program for each of 128 multiprocessors, all there at once. Sixteen warps compute; one more streams the weights of
// this program's rows into a ring in shared memory, and waits for nobody but those who read it. Each warp has 64 inputs
// of every segment of 1,024, for all of the program's rows; it takes them into registers before it waits for the inputs,
// so that nothing but arithmetic lies between their arrival and the outputs'.
//
// Programs never meet. What one computes for others goes into packets that are stored and loaded whole and say
// themselves whether they are new: by a number, or, where every bit is taken, by one bit that turns at each writing.
// (bfloat16 less than 2 in magnitude leaves its bit 14 zero; so values travel times 2^-64.) Whoever waits for a packet
// looks at it until it is new. A packet is written once a layer. It is not written anew before all have read it, for
// whoever writes has meanwhile, with its fifteen other warps, waited for something that all programs wrote after
// reading: for `before` that is `raised`, for `turned`, `found` and `raised` it is `before`, for `between` it is `raised`.
//
// The residual stream stays in registers of the program that owns its eight columns.

#ifdef EMULATED
#include EMULATED
#else

// -- what the machine does ----------------------------------------------------------------------------------

#define DEVICE __device__ __forceinline__
#define SHARED extern __shared__ __align__(128) unsigned char shared_memory[];

DEVICE unsigned address_of(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

// 16 or 8 bytes at once, past the caches that a multiprocessor has for itself.
DEVICE uint4 look(const uint4* packet) {
  unsigned long long low, high;
  asm volatile(
      "{.reg .b128 all; ld.relaxed.gpu.global.b128 all, [%2]; mov.b128 {%0, %1}, all;}"
      : "=l"(low), "=l"(high) : "l"(packet) : "memory");
  return make_uint4((unsigned)low, (unsigned)(low >> 32), (unsigned)high, (unsigned)(high >> 32));
}
DEVICE uint2 look(const uint2* packet) {
  unsigned long long all;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(all) : "l"(packet) : "memory");
  return make_uint2((unsigned)all, (unsigned)(all >> 32));
}
DEVICE void tell(uint4* packet, uint4 what) {
  unsigned long long low = what.x | (unsigned long long)what.y << 32, high = what.z | (unsigned long long)what.w << 32;
  asm volatile(
      "{.reg .b128 all; mov.b128 all, {%1, %2}; st.relaxed.gpu.global.b128 [%0], all;}"
      :: "l"(packet), "l"(low), "l"(high) : "memory");
}
DEVICE void tell(uint2* packet, uint2 what) {
  unsigned long long all = what.x | (unsigned long long)what.y << 32;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" :: "l"(packet), "l"(all) : "memory");
}
// What earlier launches have written. Volatile: it is asked for where that is written, not where it is needed.
DEVICE uint4 ask(const uint4* where) {
  uint4 all;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(all.x), "=r"(all.y), "=r"(all.z), "=r"(all.w) : "l"(where));
  return all;
}
DEVICE uint4 from_shared(unsigned where) {
  uint4 all;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(all.x), "=r"(all.y), "=r"(all.z), "=r"(all.w) : "r"(where) : "memory");
  return all;
}

DEVICE void barrier_begin(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barriers_begun() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(unsigned barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" :: "r"(barrier) : "memory");
}
DEVICE void expect(unsigned barrier, unsigned bytes) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}"
      :: "r"(barrier), "r"(bytes) : "memory");
}
DEVICE bool passed(unsigned barrier, unsigned parity) {
  unsigned done;
  asm volatile(
      "{.reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
      : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}
DEVICE unsigned long long once_only() {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void copy(unsigned to, const void* from, unsigned bytes, unsigned barrier, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
// The warps that compute, without the one that streams.
DEVICE void meet() { asm volatile("bar.sync 1, 512;" ::: "memory"); }
DEVICE void all_meet() { __syncthreads(); }
// A quarter of the registers lies with each fourth warp: 96 for each of five, or 112 for four and 32 for the fifth.
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 112;"); }
DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 32;"); }

DEVICE void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The first is the lower half.
DEVICE unsigned rounded(float first, float second) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
DEVICE float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float logarithm_to_2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// -- shapes -------------------------------------------------------------------------------------------------

#define ALL 0xffffffffu
#define MINUS_INFINITY __uint_as_float(0xff800000u)
#define UNROLL _Pragma("unroll")

constexpr int D = 1024, F = 4096, HEADS = 16, HD = 64;
constexpr int PROGRAMS = 128, WARPS = 16, THREADS = (WARPS + 4) * 32;
constexpr int SPLITS = 8 / M;
static_assert(M * SPLITS == 8, "rows and splits are the eight columns of a product");

// A unit is 1,024 weights of a row; 64 bytes more keep the rows of a group off each other's banks.
constexpr int UNIT_BYTES = D * 2, UNIT = UNIT_BYTES + 64, GROUP = 8 * UNIT;
// Of each row of M: 64 outputs and a sum of squares, each in sixteen parts; four more keep outputs off each other's banks.
constexpr int OUTPUTS = 65, STRIDE = 20, PARTS = M * OUTPUTS * STRIDE;
// Of each warp in attention: 64 sums; highest score and total.
constexpr int FOUND = 64 + 4;
static_assert(SHARED_BYTES >= RING * GROUP + (2 * PARTS + WARPS * FOUND) * 4 + 12 * M * 32 + 2 * RING * 8, "as whole.py counts them");
// Logits beyond those that every program has 64 of; eight more for each of the first programs.
constexpr int TAIL = V - 64 * PROGRAMS, TAILS = (TAIL + 7) / 8;
static_assert(TAIL >= 0 && TAILS <= PROGRAMS, "one tail for a program at most");

constexpr float UP_64 = 18446744073709551616.0f, DOWN_64 = 1.0f / UP_64;
constexpr float LOG2_E = 1.4426950408889634f;

// Where a thread's pair of outputs goes that turn together, and how.
struct Turning {
  float cosine, sine;
  int to, which;   // in turned; query, key or value
  long long kept;  // in a layer's cache
  long long nothing;
};
static_assert(sizeof(Turning) == 32, "two loads");

struct Told {
  const float* x;                       // (M, D), what goes into the first layer
  const int* rows;                      // (M), of the cache
  const int* at;                        // (M), the position
  const float* cos;                     // (positions, HD)
  const float* sin;
  const unsigned short* const* layers;  // (LAYERS, 4): qkv, out, up, down
  const unsigned short* head;           // (V, D)
  unsigned short* keys;                 // (LAYERS, rows, HEADS, positions, HD)
  unsigned short* values;
  long long layer_stride;               // in elements
  long long row_stride;
  long long head_stride;
  uint4* before;                        // residual stream before a layer: four columns, sum of their squares, number
  uint4* between;                       // the same between attention and feed-forward
  uint4* turned;                        // queries, keys, values: four columns, nothing, number
  uint4* found;                         // by attention: eight columns, one bit
  uint2* weighed;                       // logarithm to 2 of the sum of what it made of the scores, number
  uint4* raised;                        // in feed-forward: eight columns, one bit
  float* logits;                        // (M, V)
  unsigned* launches;                   // so many before this one
  const int* watched;                   // (LAYERS, HEADS): where in scores, or -1
  float* scores;                        // (M / 2, WATCHED, positions)
  long long positions;
  int* stuck;                           // (4): whether, place, program, warp
  float eps;
};

// -- waiting ------------------------------------------------------------------------------------------------

// Where a wait is: the layer times eight, and what for.
enum { RING_FULL, RING_FREE, FOR_BEFORE, FOR_TURNED, FOR_FOUND, FOR_BETWEEN, FOR_RAISED };

struct Patience {
#ifdef BOUNDED
  unsigned spins = 0;
  // About a second; then, or if anybody else has given up, so does this one, and what comes of it all is wrong.
  DEVICE bool over(int* stuck, int place) {
    if (++spins < BOUNDED && (spins % 1024 || *(volatile int*)stuck == 0)) return false;
    if (atomicCAS(stuck, 0, 1) == 0) {
      stuck[1] = place;
      stuck[2] = blockIdx.x;
      stuck[3] = threadIdx.x / 32;
    }
    return true;
  }
#else
  DEVICE bool over(int*, int) { return false; }
#endif
};

struct Ring {
  unsigned base, full, free;
  int slot;
  unsigned parity;
  unsigned zero;  // though no compiler knows
  int* stuck;

  DEVICE void wait(unsigned barrier, unsigned for_parity, int place) const {
    Patience patience;
    while (!passed(barrier + slot * 8, for_parity) && !patience.over(stuck, place)) {
    }
  }
  DEVICE void next() {
    if (++slot == RING) {
      slot = 0;
      parity ^= 1;
    }
  }
  // Eight rows' units, each lane's own; from the side that streams.
  DEVICE void send(const unsigned short* unit, int units, int lane, unsigned long long policy, int place) {
    wait(free, parity ^ 1, place);
    if (lane == 0) expect(full + slot * 8, units * UNIT_BYTES);
    __syncwarp();
    if (lane < units) copy(base + slot * GROUP + lane * UNIT, unit, UNIT_BYTES, full + slot * 8, policy);
    next();
  }
  // A lane's weights of so many groups: of row lane / 4 eight, and eight 32 further on.
  template <int N>
  DEVICE void take(uint4 (&weights)[N][2], int warp, int lane, int place) {
    const int first = slot;
    unsigned any = 0;
    UNROLL for (int group = 0; group < N; group++) {
      wait(full, parity, place);
      const unsigned where = base + slot * GROUP + lane / 4 * UNIT + warp * 128 + lane % 4 * 16;
      weights[group][0] = from_shared(where);
      weights[group][1] = from_shared(where + 64);
      any |= weights[group][0].x | weights[group][1].x;
      next();
    }
    // A load may still be on its way when the next instruction runs, and arriving does not wait for it: it was seen that
    // the copy that is let in came before. Whoever needs what was loaded, if only for nothing, waits.
    __syncwarp();
    const int mine = first + lane < RING ? first + lane : first + lane - RING;
    if (lane < N) arrive(free + mine * 8 + (any & zero));
  }
};

// The first row of those four, or eight, that a group has.
DEVICE int first_of_pairs(int program, int group) {
  const int quad = 3 * program + group;
  return quad / 128 * D + quad % 128 / 8 * HD + quad % 8 * 4;
}

// In the order in which they are taken.
DEVICE void stream(const Told& told, Ring ring, int program, int lane) {
  const int row = lane % 8;
  const unsigned long long policy = once_only();
  _Pragma("unroll 1") for (int layer = 0; layer < LAYERS; layer++) {
    const int place = layer * 8 + RING_FREE;
    const unsigned short* const* const matrices = told.layers + 4 * layer;
    const unsigned short *qkv = matrices[0], *out = matrices[1], *up = matrices[2], *down = matrices[3];
    _Pragma("unroll 1") for (int group = 0; group < 3; group++) {
      const int n = first_of_pairs(program, group) + row % 4 + row / 4 * (HD / 2);
      ring.send(qkv + n * D, 8, lane, policy, place);
    }
    ring.send(out + (8 * program + row) * D, 8, lane, policy, place);
    up += (32 * program + row) * D;
    _Pragma("unroll 1") for (int octet = 0; octet < 4; octet++, up += 8 * D) {
      ring.send(up, 8, lane, policy, place);
      ring.send(up + F * D, 8, lane, policy, place);
    }
    down += (8 * program + row) * F;
    _Pragma("unroll 1") for (int segment = 0; segment < F / D; segment++, down += D)
      ring.send(down, 8, lane, policy, place);
  }
  _Pragma("unroll 1") for (int group = 0; group < 8; group++)
    ring.send(told.head + (64 * program + 8 * group + row) * D, 8, lane, policy, LAYERS * 8 + RING_FREE);
  if (program < TAILS) {
    const int left = TAIL - 8 * program;
    ring.send(told.head + (64 * PROGRAMS + 8 * program + row) * D, left < 8 ? left : 8, lane, policy, LAYERS * 8 + RING_FREE);
  }
}

// -- products -----------------------------------------------------------------------------------------------

// 32 inputs of sixteen rows: both sides have them in the same other order, in which a lane's eight lie together.
DEVICE void product(float (&sums)[4], const uint4& upper, const uint4& lower, const uint4& inputs) {
  multiply(sums, upper.x, lower.x, upper.y, lower.y, inputs.x, inputs.y);
  multiply(sums, upper.z, lower.z, upper.w, lower.w, inputs.z, inputs.w);
}

// A warp's part of a group's outputs.
DEVICE void leave(float* parts, int group, float even, float odd, int warp, int lane) {
  const int row = lane % 4 * 2;
  float* part = parts + (row * OUTPUTS + group * 8 + lane / 4) * STRIDE + warp;
  if (row < M) part[0] = even;
  if (row + 1 < M) part[OUTPUTS * STRIDE] = odd;
}
DEVICE void leave_squares(float* parts, float squares, int warp, int lane) {
  squares += __shfl_xor_sync(ALL, squares, 1);
  squares += __shfl_xor_sync(ALL, squares, 2);
  if (lane % 4 == 0 && lane / 4 < M) parts[(lane / 4 * OUTPUTS + 64) * STRIDE + warp] = squares;
}
// Always in the same order.
DEVICE float sum(const float* parts, int row, int output) {
  const float4* part = (const float4*)(parts + (row * OUTPUTS + output) * STRIDE);
  const float4 a = part[0], b = part[1], c = part[2], d = part[3];
  return ((a.x + a.y) + (a.z + a.w) + ((b.x + b.y) + (b.z + b.w))) +
         ((c.x + c.y) + (c.z + c.w) + ((d.x + d.y) + (d.z + d.w)));
}
DEVICE float norm(const float* parts, int row, float eps) {
  return reciprocal_root(sum(parts, row, 64) * (1.0f / D) + eps);
}

// -- packets ------------------------------------------------------------------------------------------------

// A lane's inputs of the residual stream: of row lane / 4, and of its squares this lane's sum.
DEVICE void await_stream(
    const uint4* from, unsigned number, uint4 (&inputs)[2], float& squares, int warp, int lane, int* stuck, int place) {
  const bool mine = lane / 4 < M;
  // Pieces of 32 columns, halves of eight columns, rows, eights of columns.
  const uint4* first = from + warp * 16 * M + lane;
  uint4 packet[4] = {};
  Patience patience;
  bool there;
  do {
    if (mine) UNROLL for (int n = 0; n < 4; n++) packet[n] = look(first + n * 4 * M);
    there = packet[0].w == number && packet[1].w == number && packet[2].w == number && packet[3].w == number;
  } while (!__all_sync(ALL, there || !mine || patience.over(stuck, place)));
  UNROLL for (int n = 0; n < 2; n++)
    inputs[n] = make_uint4(packet[2 * n].x, packet[2 * n].y, packet[2 * n + 1].x, packet[2 * n + 1].y);
  squares = __uint_as_float(packet[0].z) + __uint_as_float(packet[1].z) +
            (__uint_as_float(packet[2].z) + __uint_as_float(packet[3].z));
}
// Column lane % 8 of this program's eight, of row thread / 8.
DEVICE void tell_stream(uint4* to, unsigned number, float x, int program, int thread) {
  float squares = x * x;
  squares += __shfl_xor_sync(ALL, squares, 1);
  squares += __shfl_xor_sync(ALL, squares, 2);
  const unsigned two = rounded(x, __shfl_down_sync(ALL, x, 1));
  const unsigned other = __shfl_down_sync(ALL, two, 2);
  const int row = thread / 8, half = thread % 8 / 4;
  if (row < M && thread % 4 == 0)
    tell(to + ((program / 4 * 2 + half) * M + row) * 4 + program % 4,
         make_uint4(two, other, __float_as_uint(squares), number));
}

constexpr unsigned TURN = 0x4000;

DEVICE bool is_new(const uint4& packet, unsigned turn) { return (packet.x & TURN) == turn; }
DEVICE uint4 with_turn(const uint4& packet, unsigned turn) {
  return make_uint4((packet.x & ~TURN) | turn, packet.y, packet.z, packet.w);
}

DEVICE void unpacked(const uint4& packet, float (&x)[8]) {
  const unsigned words[4] = {packet.x, packet.y, packet.z, packet.w};
  UNROLL for (int n = 0; n < 4; n++) {
    x[2 * n] = __uint_as_float(words[n] << 16);
    x[2 * n + 1] = __uint_as_float(words[n] & 0xffff0000u);
  }
}
// Eight columns of queries, keys or values.
DEVICE uint4 await_turned(const uint4* from, unsigned number, int* stuck, int place) {
  uint4 first, second;
  Patience patience;
  do {
    first = look(from);
    second = look(from + 1);
  } while (!__all_sync(ALL, (first.w == number && second.w == number) || patience.over(stuck, place)));
  return make_uint4(first.x, first.y, second.x, second.y);
}

// -- attention ----------------------------------------------------------------------------------------------

// A warp looks at four positions at once, eight lanes at each, eight columns a lane; its own softmax in each eight.
constexpr int ROUND = WARPS * 4, AHEAD = 4;

struct Attention {
  float top, total, sums[8];
};

struct Span {
  const uint4 *keys, *values;  // of this lane's columns, at position 0
  int first, end;              // of this lane's positions, the first, and where they end
  DEVICE bool has(int round) const { return first + round * ROUND < end; }
  DEVICE void load(uint4 (&k)[AHEAD], uint4 (&v)[AHEAD], int from) const {
    UNROLL for (int n = 0; n < AHEAD; n++) {
      k[n] = v[n] = make_uint4(0, 0, 0, 0);
      if (has(from + n)) {
        const long long where = (long long)(first + (from + n) * ROUND) * (HD / 8);
        k[n] = ask(keys + where);
        v[n] = ask(values + where);
      }
    }
  }
};

// By 2 to the power of: queries have the logarithm in them.
DEVICE float score_of(const uint4& key, const float (&query)[8]) {
  float k[8];
  unpacked(key, k);
  float score = 0;
  UNROLL for (int n = 0; n < 8; n++) score += k[n] * query[n];
  score += __shfl_xor_sync(ALL, score, 1);
  score += __shfl_xor_sync(ALL, score, 2);
  score += __shfl_xor_sync(ALL, score, 4);
  return score;
}
// Whatever has nothing in it has a highest score of minus infinity, and counts for nothing.
DEVICE float reference(float top) { return top == MINUS_INFINITY ? 0.0f : top; }

template <int N>
DEVICE void attend(Attention& so_far, const float (&scores)[N], const uint4 (&values)[N]) {
  float top = so_far.top;
  UNROLL for (int n = 0; n < N; n++) top = fmaxf(top, scores[n]);
  const float fade = power_of_2(so_far.top - reference(top));
  so_far.total *= fade;
  UNROLL for (int i = 0; i < 8; i++) so_far.sums[i] *= fade;
  UNROLL for (int n = 0; n < N; n++) {
    const float weight = power_of_2(scores[n] - reference(top));
    float v[8];
    unpacked(values[n], v);
    so_far.total += weight;
    UNROLL for (int i = 0; i < 8; i++) so_far.sums[i] += weight * v[i];
  }
  so_far.top = top;
}
// Of four in a warp that have the same columns, one.
DEVICE void merge(Attention& one) {
  float top = fmaxf(one.top, __shfl_xor_sync(ALL, one.top, 8));
  top = fmaxf(top, __shfl_xor_sync(ALL, top, 16));
  const float fade = power_of_2(one.top - reference(top));
  one.top = top;
  one.total *= fade;
  one.total += __shfl_xor_sync(ALL, one.total, 8);
  one.total += __shfl_xor_sync(ALL, one.total, 16);
  UNROLL for (int i = 0; i < 8; i++) {
    one.sums[i] *= fade;
    one.sums[i] += __shfl_xor_sync(ALL, one.sums[i], 8);
    one.sums[i] += __shfl_xor_sync(ALL, one.sums[i], 16);
  }
}

// -- the step -----------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1) whole(const Told told) {
  SHARED
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, program = blockIdx.x;
  // Two, in turn: whoever leaves something has met all after they had read what lay there before.
  float* const even_parts = (float*)(shared_memory + RING * GROUP);
  float* const odd_parts = even_parts + PARTS;
  float* const warps_found = odd_parts + PARTS;
  Turning* const turnings = (Turning*)(warps_found + WARPS * FOUND);
  const unsigned barriers = address_of(turnings + 12 * M);
  Ring ring{address_of(shared_memory), barriers, barriers + RING * 8, 0, 0, __float_as_uint(told.eps) >> 31, told.stuck};
  if (thread == 0) {
    for (int slot = 0; slot < RING; slot++) {
      barrier_begin(ring.full + slot * 8, 1);
      barrier_begin(ring.free + slot * 8, WARPS);
    }
    barriers_begun();
  }
  all_meet();
  if (warp >= WARPS) {
    // Registers go from four warps to four; of these, three have nothing else to do.
    give_registers();
    if (warp == WARPS) stream(told, ring, program, lane);
    return;
  }
  take_registers();

  const unsigned launches = *told.launches;
  const uint4 nothing = make_uint4(0, 0, 0, 0);

  // What a thread owns of the residual stream: column thread % 8 of this program's, of row thread / 8.
  const bool owns = thread < 8 * M;
  const int owned = 8 * program + thread % 8;
  float x = owns ? told.x[thread / 8 * D + owned] : 0.0f;
  // Packets of the residual stream are written once more than the others.
  if (warp * 32 < 8 * M) tell_stream(told.before, launches * (LAYERS + 1) + 1, x, program, thread);

  // Its pair of outputs that turn together, if it has one: fours of pairs, three of them a row.
  if (thread < 12 * M) {
    const int of = thread / 12, left = first_of_pairs(program, thread / 4 % 3);
    const int which = left / D, of_head = left % D / HD, inside = left % HD;
    // Lane 0 of four sends the left halves, lane 2 the right ones.
    const int column = inside + thread % 4 / 2 * (HD / 2), here = told.at[of];
    Turning turning{1, 0, ((which * M + of) * HEADS + of_head) * (HD / 4) + column / 4, which, 0, 0};
    if (which < 2) {
      turning.cosine = told.cos[here * HD + inside + thread % 4];
      turning.sine = told.sin[here * HD + inside + thread % 4];
    }
    turning.kept = told.rows[of] * told.row_stride + of_head * told.head_stride + here * HD + column;
    turnings[thread] = turning;
  }

  // This program's part of attention: a head of a row, and which of its splits.
  const int head = program / 8, row = program % 8 % M, split = program % 8 / M;
  const int here = told.at[row], share = (here + SPLITS - 1) / SPLITS;
  const long long base = (long long)told.rows[row] * told.row_stride + head * told.head_stride + lane % 8 * 8;
  Span span;
  span.first = split * share + warp * 4 + lane / 8;
  span.end = min(split * share + share, here);
  // The newest position is not in the cache: it is one lane eight's of one warp, in the last split.
  const bool has_newest = split == SPLITS - 1 && warp == WARPS - 1;

  for (int layer = 0; layer < LAYERS; layer++) {
    const unsigned number = launches * LAYERS + layer + 1, turn = number % 2 * TURN;
    const int place = layer * 8;
    span.keys = (const uint4*)(told.keys + layer * told.layer_stride + base);
    span.values = (const uint4*)(told.values + layer * told.layer_stride + base);
    uint4 k[AHEAD], v[AHEAD];

    {  // Queries, keys, values.
      uint4 weights[3][2], inputs[2];
      ring.take(weights, warp, lane, place + RING_FULL);
      span.load(k, v, 0);
      float squares, sums[2][4] = {};
      await_stream(told.before, number + launches, inputs, squares, warp, lane, told.stuck, place + FOR_BEFORE);
      UNROLL for (int n = 0; n < 2; n++) {
        product(sums[0], weights[0][n], weights[1][n], inputs[n]);
        product(sums[1], weights[2][n], nothing, inputs[n]);
      }
      leave(even_parts, 0, sums[0][0], sums[0][1], warp, lane);
      leave(even_parts, 1, sums[0][2], sums[0][3], warp, lane);
      leave(even_parts, 2, sums[1][0], sums[1][1], warp, lane);
      leave_squares(even_parts, squares, warp, lane);
      meet();
      if (warp * 32 < 12 * M) {
        // Threads beyond do as the last one does, and say nothing of it.
        const int pair = min(thread, 12 * M - 1), first = pair / 4 % 3 * 8 + thread % 4;
        const Turning turning = turnings[pair];
        const float scale = norm(even_parts, pair / 12, told.eps);
        const float one = sum(even_parts, pair / 12, first) * scale;
        const float two = sum(even_parts, pair / 12, first + 4) * scale;
        const float lefts = one * turning.cosine - two * turning.sine;
        const float rights = two * turning.cosine + one * turning.sine;
        const unsigned two_lefts = rounded(lefts, __shfl_down_sync(ALL, lefts, 1));
        const unsigned two_rights = rounded(rights, __shfl_down_sync(ALL, rights, 1));
        const unsigned other_lefts = __shfl_xor_sync(ALL, two_lefts, 2);
        const unsigned other_rights = __shfl_xor_sync(ALL, two_rights, 2);
        const uint2 four = thread % 4 == 0 ? make_uint2(two_lefts, other_lefts) : make_uint2(other_rights, two_rights);
        if (thread < 12 * M && thread % 2 == 0) {
          tell(told.turned + turning.to, make_uint4(four.x, four.y, 0, number));
          if (turning.which > 0) {
            unsigned short* const cache = turning.which == 1 ? told.keys : told.values;
            *(uint2*)(cache + layer * told.layer_stride + turning.kept) = four;
          }
        }
      }
    }

    uint4 projection[1][2];
    ring.take(projection, warp, lane, place + RING_FULL);

    {  // Attention of this program's row, head and split.
      const uint4* const sent = told.turned + (row * HEADS + head) * (HD / 4) + lane % 8 * 2;
      float query[8];
      unpacked(await_turned(sent, number, told.stuck, place + FOR_TURNED), query);
      UNROLL for (int n = 0; n < 8; n++) query[n] *= LOG2_E / 8;
#if WATCHED
      const int watch = row % 2 == 0 ? told.watched[layer * HEADS + head] : -1;
      float* const scores_of = told.scores + (row / 2 * WATCHED + (watch < 0 ? 0 : watch)) * told.positions;
      const bool watches = watch >= 0 && lane % 8 == 0;
#endif
      Attention mine{MINUS_INFINITY, 0.0f, {}};
      // Lanes of a warp go on together: where one has a position, all come along.
      for (int from = 0; __any_sync(ALL, span.has(from));) {
        UNROLL for (int two = 0; two < AHEAD; two += 2) {
          if (two && !__any_sync(ALL, span.has(from + two))) break;
          float scores[2];
          const uint4 values[2] = {v[two], v[two + 1]};
          UNROLL for (int n = 0; n < 2; n++) {
            const bool there = span.has(from + two + n);
            const float score = score_of(k[two + n], query);
            scores[n] = there ? score : MINUS_INFINITY;
#if WATCHED
            if (watches && there) scores_of[span.first + (from + two + n) * ROUND] = score / LOG2_E;
#endif
          }
          attend(mine, scores, values);
        }
        from += AHEAD;
        if (__any_sync(ALL, span.has(from))) span.load(k, v, from);
      }
      if (has_newest) {
        const int apart = M * HEADS * (HD / 4);
        const uint4 key = await_turned(sent + apart, number, told.stuck, place + FOR_TURNED);
        const uint4 value[1] = {await_turned(sent + 2 * apart, number, told.stuck, place + FOR_TURNED)};
        const float score = score_of(key, query);
        const float scores[1] = {lane / 8 == 0 ? score : MINUS_INFINITY};
        attend(mine, scores, value);
#if WATCHED
        if (watches && lane == 0) scores_of[here] = score / LOG2_E;
#endif
      }
      merge(mine);
      float* const found = warps_found + warp * FOUND;
      if (lane < 8) {
        *(float4*)(found + lane * 8) = make_float4(mine.sums[0], mine.sums[1], mine.sums[2], mine.sums[3]);
        *(float4*)(found + lane * 8 + 4) = make_float4(mine.sums[4], mine.sums[5], mine.sums[6], mine.sums[7]);
      }
      if (lane == 0) *(float2*)(found + 64) = make_float2(mine.top, mine.total);
      meet();
      if (warp == 0) {
        // Eight lanes for the columns, four times, each with four warps' findings.
        Attention all{MINUS_INFINITY, 0.0f, {}};
        const float* const theirs = warps_found + lane / 8 * 4 * FOUND;
        UNROLL for (int n = 0; n < 4; n++) all.top = fmaxf(all.top, theirs[n * FOUND + 64]);
        UNROLL for (int n = 0; n < 4; n++) {
          const float fade = power_of_2(theirs[n * FOUND + 64] - reference(all.top));
          all.total += fade * theirs[n * FOUND + 65];
          UNROLL for (int i = 0; i < 8; i++) all.sums[i] += fade * theirs[n * FOUND + lane % 8 * 8 + i];
        }
        merge(all);
        const float scale = all.total > 0 ? reciprocal(all.total) * DOWN_64 : 0.0f;
        const uint4 packet = make_uint4(
            rounded(all.sums[0] * scale, all.sums[1] * scale), rounded(all.sums[2] * scale, all.sums[3] * scale),
            rounded(all.sums[4] * scale, all.sums[5] * scale), rounded(all.sums[6] * scale, all.sums[7] * scale));
        // Heads, halves, columns of the product, eights.
        if (lane < 8)
          tell(told.found + ((head * 2 + lane / 4) * 8 + program % 8) * 4 + lane % 4, with_turn(packet, turn));
        const float weight = all.total > 0 ? all.top + logarithm_to_2(all.total) : MINUS_INFINITY;
        if (lane == 0) tell(told.weighed + program, make_uint2(__float_as_uint(weight), number));
      }
    }

    {  // Projection. A warp has a head; each split of each row is a column, and they are weighed behind the product.
      uint4 packet[2];
      uint2 weighed;
      Patience patience;
      bool there;
      do {
        packet[0] = look(told.found + warp * 64 + lane);
        packet[1] = look(told.found + warp * 64 + 32 + lane);
        weighed = look(told.weighed + warp * 8 + lane % 8);
        there = is_new(packet[0], turn) && is_new(packet[1], turn) && weighed.y == number;
      } while (!__all_sync(ALL, there || patience.over(told.stuck, place + FOR_FOUND)));
      const float weight = __uint_as_float(weighed.x);
      float top = weight;
      UNROLL for (int apart = M; apart < 8; apart *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, apart));
      float part = power_of_2(weight - top), total = part;
      UNROLL for (int apart = M; apart < 8; apart *= 2) total += __shfl_xor_sync(ALL, total, apart);
      part *= reciprocal(total) * UP_64;
      const float even = __shfl_sync(ALL, part, lane % 4 * 2), odd = __shfl_sync(ALL, part, lane % 4 * 2 + 1);
      float sums[4] = {};
      UNROLL for (int n = 0; n < 2; n++) product(sums, projection[0][n], nothing, with_turn(packet[n], 0));
      sums[0] *= even;
      sums[1] *= odd;
      if (M == 1) sums[0] += sums[1];
      // A lane has columns lane % 4 * 2 and the next.
      UNROLL for (int apart = M < 2 ? 1 : M / 2; apart < 4; apart *= 2) {
        sums[0] += __shfl_xor_sync(ALL, sums[0], apart);
        sums[1] += __shfl_xor_sync(ALL, sums[1], apart);
      }
      leave(odd_parts, 0, sums[0], sums[1], warp, lane);
      meet();
      if (warp * 32 < 8 * M) {
        if (owns) x += sum(odd_parts, thread / 8, thread % 8);
        tell_stream(told.between, number, x, program, thread);
      }
    }

    {  // Gate, what it lets through, and the two multiplied. A product has eight of each.
      uint4 weights[8][2], inputs[2];
      ring.take(weights, warp, lane, place + RING_FULL);
      float squares, sums[4][4] = {};
      await_stream(told.between, number, inputs, squares, warp, lane, told.stuck, place + FOR_BETWEEN);
      UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int octet = 0; octet < 4; octet++)
          product(sums[octet], weights[2 * octet][n], weights[2 * octet + 1][n], inputs[n]);
      UNROLL for (int octet = 0; octet < 4; octet++) {
        leave(even_parts, 2 * octet, sums[octet][0], sums[octet][1], warp, lane);
        leave(even_parts, 2 * octet + 1, sums[octet][2], sums[octet][3], warp, lane);
      }
      leave_squares(even_parts, squares, warp, lane);
      meet();
      if (warp < M) {
        const float scale = norm(even_parts, warp, told.eps);
        const int output = lane / 8 * 16 + lane % 8;
        const float gate = sum(even_parts, warp, output) * scale, through = sum(even_parts, warp, output + 8) * scale;
        const float let = gate * reciprocal(1.0f + power_of_2(-LOG2_E * gate)) * through * DOWN_64;
        const unsigned two = rounded(let, __shfl_down_sync(ALL, let, 1));
        const uint4 packet = make_uint4(
            two, __shfl_down_sync(ALL, two, 2), __shfl_down_sync(ALL, two, 4), __shfl_down_sync(ALL, two, 6));
        if (lane % 8 == 0) tell(told.raised + (program * M + warp) * 4 + lane / 8, with_turn(packet, turn));
      }
    }

    {  // And back.
      uint4 weights[4][2];
      ring.take(weights, warp, lane, place + RING_FULL);
      // Segments, pieces of 32 columns, rows, eights of columns.
      const uint4* const first = told.raised + warp * 8 * M + lane;
      const bool mine = lane / 4 < M;
      uint4 packet[8] = {};
      Patience patience;
      bool there;
      do {
        there = true;
        if (mine) {
          UNROLL for (int n = 0; n < 8; n++) packet[n] = look(first + (n / 2 * 32 + n % 2) * 4 * M);
          UNROLL for (int n = 0; n < 8; n++) there = there && is_new(packet[n], turn);
        }
      } while (!__all_sync(ALL, there || patience.over(told.stuck, place + FOR_RAISED)));
      float sums[4][4] = {};
      UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int segment = 0; segment < 4; segment++)
          product(sums[segment], weights[segment][n], nothing, with_turn(packet[segment * 2 + n], 0));
      const float even = (sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]);
      const float odd = (sums[0][1] + sums[1][1]) + (sums[2][1] + sums[3][1]);
      leave(odd_parts, 0, even * UP_64, odd * UP_64, warp, lane);
      meet();
      if (warp * 32 < 8 * M) {
        if (owns) x += sum(odd_parts, thread / 8, thread % 8);
        tell_stream(told.before, number + launches + 1, x, program, thread);
      }
    }
  }

  {  // Logits.
    uint4 weights[8][2], inputs[2];
    ring.take(weights, warp, lane, LAYERS * 8 + RING_FULL);
    float squares, sums[4][4] = {};
    await_stream(
        told.before, (launches + 1) * (LAYERS + 1), inputs, squares, warp, lane, told.stuck, LAYERS * 8 + FOR_BEFORE);
    UNROLL for (int n = 0; n < 2; n++)
      UNROLL for (int pair = 0; pair < 4; pair++)
        product(sums[pair], weights[2 * pair][n], weights[2 * pair + 1][n], inputs[n]);
    UNROLL for (int pair = 0; pair < 4; pair++) {
      leave(even_parts, 2 * pair, sums[pair][0], sums[pair][1], warp, lane);
      leave(even_parts, 2 * pair + 1, sums[pair][2], sums[pair][3], warp, lane);
    }
    leave_squares(even_parts, squares, warp, lane);
    meet();
    // All programs have told of the last layer, so all have read it.
    if (program == 0 && thread == 0) *told.launches = launches + 1;
    if (thread < 64 * M)
      told.logits[thread / 64 * V + 64 * program + thread % 64] =
          sum(even_parts, thread / 64, thread % 64) * norm(even_parts, thread / 64, told.eps);
    if (program < TAILS) {
      uint4 tail[1][2];
      ring.take(tail, warp, lane, LAYERS * 8 + RING_FULL);
      float rest[4] = {};
      UNROLL for (int n = 0; n < 2; n++) product(rest, tail[0][n], nothing, inputs[n]);
      leave(odd_parts, 0, rest[0], rest[1], warp, lane);
      leave_squares(odd_parts, squares, warp, lane);
      meet();
      const int output = 8 * program + thread % 8;
      if (thread < 8 * M && output < TAIL)
        told.logits[thread / 8 * V + 64 * PROGRAMS + output] =
            sum(odd_parts, thread / 8, thread % 8) * norm(odd_parts, thread / 8, told.eps);
    }
  }
}
