// A GPU for whole.cu, slow and exact: each of a launch's lanes is a fibre, and they take turns in an order that a seed
// decides. What lanes of a warp do together waits for all 32; a copy into shared memory lands some turns later.
// x86-64 alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#include <sys/mman.h>

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::min;

namespace machine {

struct Meeting {
  unsigned times = 0, arrived = 0;
};
struct Warp : Meeting {
  uint64_t in[32][4], out[2][32][4];
};
struct Barrier {
  unsigned count = 0, pending = 0, phase = 0;
  long bytes = 0;
  void settle() {
    if (pending == 0 && bytes == 0) phase++, pending = count;
  }
};
struct Copy {
  unsigned to;
  const void* from;
  unsigned bytes, barrier;
  int turns;
};
struct Program {
  std::vector<unsigned char> memory;
  unsigned char* shared;
  std::vector<Barrier> barriers;
  std::vector<Copy> copies;
  std::vector<Warp> warps;
  Meeting all, computing;
  int paused = 0;
};
struct Lane {
  void* stack_pointer;
  int program, thread;
  bool done = false;
};
static std::vector<Program> programs;
static std::vector<Lane> lanes;
static Lane* now;
static void* scheduler;
static std::mt19937 dice;
static unsigned shared_bytes, all_threads;

extern "C" void machine_switch(void** save, void* load);
asm(R"(
.text
.globl machine_switch
machine_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
)");
__attribute__((noinline)) static void yield() { machine_switch(&now->stack_pointer, scheduler); }
__attribute__((noinline)) static Lane& lane() { return *now; }
static Program& program() { return programs[lane().program]; }
static void check(bool right, const char* what) {
  if (right) return;
  fprintf(stderr, "program %d, thread %d: %s\n", lane().program, lane().thread, what);
  abort();
}

static void meet(Meeting& meeting, unsigned count) {
  const unsigned times = meeting.times;
  if (++meeting.arrived == count) {
    meeting.arrived = 0, meeting.times++;
    return;
  }
  while (meeting.times == times) yield();
}
static const uint64_t (*exchange(const uint64_t (&mine)[4]))[4] {
  Warp& warp = program().warps[lane().thread / 32];
  memcpy(warp.in[lane().thread % 32], mine, sizeof mine);
  const unsigned times = warp.times;
  if (warp.arrived == 31) memcpy(warp.out[times & 1], warp.in, sizeof warp.in);
  meet(warp, 32);
  return warp.out[times & 1];
}
template <class T> static T from_lane(T x, int other) {
  uint64_t mine[4] = {};
  memcpy(mine, &x, sizeof x);
  const auto all = exchange(mine);
  memcpy(&x, all[other & 31], sizeof x);
  return x;
}
static float of_bf16(unsigned bits) {
  const unsigned word = bits << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}
static unsigned bf16(float x) {
  unsigned word;
  memcpy(&word, &x, 4);
  if (x != x) return 0x7fff;
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

}  // namespace machine

struct Index { int x; };
#define threadIdx (Index{machine::lane().thread})
#define blockIdx (Index{machine::lane().program})
#define DEVICE inline
#define SHARED unsigned char* const shared_memory = machine::program().shared;
#define __global__
#define __launch_bounds__(...)

static unsigned address_of(const void* shared) { return (unsigned)((const unsigned char*)shared - machine::program().shared); }
static uint4 look(const uint4* packet) { return *packet; }
static uint2 look(const uint2* packet) { return *packet; }
static void tell(uint4* packet, uint4 what) { *packet = what; }
static void tell(uint2* packet, uint2 what) { *packet = what; }
static uint4 ask(const uint4* where) {
  machine::check((uintptr_t)where % 16 == 0, "asks for what is not aligned");
  return *where;
}
static uint4 from_shared(unsigned where) {
  machine::check(where % 16 == 0 && where + 16 <= machine::shared_bytes, "reads beyond shared memory");
  return *(const uint4*)(machine::program().shared + where);
}
static machine::Barrier& barrier_at(unsigned barrier) {
  machine::check(barrier % 8 == 0 && barrier + 8 <= machine::shared_bytes, "a barrier beyond shared memory");
  return machine::program().barriers[barrier / 8];
}
static void barrier_begin(unsigned barrier, unsigned arrivals) { barrier_at(barrier).count = barrier_at(barrier).pending = arrivals; }
static void barriers_begun() {}
static void arrive(unsigned barrier) {
  machine::Barrier& it = barrier_at(barrier);
  machine::check(it.pending > 0, "arrives once too often");
  it.pending--;
  it.settle();
}
static void expect(unsigned barrier, unsigned bytes) {
  barrier_at(barrier).bytes += bytes;
  arrive(barrier);
}
static bool passed(unsigned barrier, unsigned parity) {
  if ((barrier_at(barrier).phase & 1) != parity) return true;
  machine::yield();
  return (barrier_at(barrier).phase & 1) != parity;
}
static unsigned long long once_only() { return 0; }
static void copy(unsigned to, const void* from, unsigned bytes, unsigned barrier, unsigned long long) {
  machine::check(to % 16 == 0 && (uintptr_t)from % 16 == 0 && bytes % 16 == 0, "copies what is not aligned");
  machine::check(to + bytes <= machine::shared_bytes, "copies beyond shared memory");
  barrier_at(barrier);
  machine::program().copies.push_back({to, from, bytes, barrier, (int)(machine::dice() % 24)});
}
static void meet() { machine::meet(machine::program().computing, 512); }
static void all_meet() { machine::meet(machine::program().all, machine::all_threads); }
static void take_registers() {}
static void give_registers() {}

static void __syncwarp() { machine::from_lane(0, 0); }
template <class T> static T __shfl_sync(unsigned, T x, int other) { return machine::from_lane(x, other); }
template <class T> static T __shfl_xor_sync(unsigned, T x, int apart) { return machine::from_lane(x, machine::lane().thread % 32 ^ apart); }
template <class T> static T __shfl_down_sync(unsigned, T x, int apart) {
  const int lane = machine::lane().thread % 32;
  return machine::from_lane(x, lane + apart < 32 ? lane + apart : lane);
}
static bool __all_sync(unsigned, bool x) {
  const auto all = machine::exchange({x});
  return std::all_of(all, all + 32, [](const uint64_t (&one)[4]) { return one[0] != 0; });
}
static bool __any_sync(unsigned, bool x) {
  const auto all = machine::exchange({x});
  return std::any_of(all, all + 32, [](const uint64_t (&one)[4]) { return one[0] != 0; });
}
static int atomicCAS(int* where, int before, int after) {
  const int was = *where;
  if (was == before) *where = after;
  return was;
}
static float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static unsigned rounded(float first, float second) { return machine::bf16(first) | machine::bf16(second) << 16; }
static float power_of_2(float x) { return exp2f(x); }
static float logarithm_to_2(float x) { return log2f(x); }
static float reciprocal(float x) { return 1.0f / x; }
static float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

// Fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
static void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const auto all = machine::exchange({a0 | (uint64_t)a1 << 32, a2 | (uint64_t)a3 << 32, b0 | (uint64_t)b1 << 32, 0});
  const int lane = machine::lane().thread % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const uint64_t a = all[row % 8 * 4 + k % 8 / 2][k / 8] >> (row / 8 * 32 + k % 2 * 16);
      const uint64_t b = all[column * 4 + k % 8 / 2][2] >> (k / 8 * 32 + k % 2 * 16);
      c[i] += machine::of_bf16(a & 0xffff) * machine::of_bf16(b & 0xffff);
    }
  }
}

struct Told;
extern "C" void whole(const Told told);
namespace machine {
static const Told* told;
static void enter();
}  // namespace machine

// Turns until all have ended, or -1 after so many.
extern "C" int launch(const Told* told, int count, int threads, int shared, unsigned seed, int most) {
  using namespace machine;
  const size_t stack_bytes = 32768;
  machine::told = told;
  dice.seed(seed);
  shared_bytes = shared, all_threads = threads;
  programs.assign(count, {});
  for (Program& one : programs) {
    one.memory.assign(shared + 128, 0xff);
    one.shared = one.memory.data() + (128 - (uintptr_t)one.memory.data() % 128);
    one.barriers.resize(shared / 8);
    one.warps.resize(threads / 32);
  }
  lanes.assign((size_t)count * threads, {});
  auto* const stacks = (unsigned char*)mmap(nullptr, lanes.size() * stack_bytes, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return -2;
  for (size_t n = 0; n < lanes.size(); n++) {
    lanes[n].program = n / threads, lanes[n].thread = n % threads;
    // Not at the same place of every page.
    auto** top = (void**)(stacks + (n + 1) * stack_bytes - 64 * (n % 16));
    *--top = nullptr;
    *--top = (void*)enter;
    lanes[n].stack_pointer = top - 6;
  }
  std::vector<int> order(count);
  for (int n = 0; n < count; n++) order[n] = n;
  size_t left = lanes.size();
  int turns = 0;
  for (; left && turns < most; turns++) {
    std::shuffle(order.begin(), order.end(), dice);
    for (const int number : order) {
      Program& one = programs[number];
      // Some are late, by far.
      if (one.paused == 0 && dice() % 256 == 0) one.paused = dice() % 64;
      if (one.paused > 0) {
        one.paused--;
        continue;
      }
      for (size_t n = 0; n < one.copies.size();) {
        Copy& it = one.copies[n];
        if (it.turns-- > 0) {
          n++;
          continue;
        }
        memcpy(one.shared + it.to, it.from, it.bytes);
        Barrier& barrier = one.barriers[it.barrier / 8];
        barrier.bytes -= it.bytes;
        barrier.settle();
        it = one.copies.back();
        one.copies.pop_back();
      }
      const int first = dice() % threads;
      for (int n = 0; n < threads; n++) {
        Lane& it = lanes[(size_t)number * threads + (first + n) % threads];
        if (it.done) continue;
        now = &it;
        machine_switch(&scheduler, it.stack_pointer);
        left -= it.done;
      }
    }
  }
  munmap(stacks, lanes.size() * stack_bytes);
  for (const Program& one : programs)
    if (!left && !one.copies.empty()) return -3;
  return left ? -1 : turns;
}

#define ENTER                          \
  static void machine::enter() {       \
    whole(*told);                      \
    lane().done = true;                \
    yield();                           \
  }
