// Runs PTX, the assembly that nvcc and Triton write for GPUs, on the CPU, as a Python module: what compilers made of a
// kernel can then be tested without a GPU, and watched more closely than a GPU would.
//
// A grid's blocks run side by side, their warps take turns in random order for a random number of instructions, lanes
// of a warp that branch apart run one group after the other. Every access to memory is looked at, and these are errors:
// one outside of the tensors, or not aligned; one that another thread's may come before or after, because no barrier or
// atomic stands between; a read of shared memory that nobody wrote. Only instructions that the kernels use are known.
//
// Semantics: NVIDIA, "PTX ISA", chapters 8 (memory consistency) and 9 (instructions).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tensor.h"

namespace py = pybind11;
using pyfast_ppo::BFloat16;
using pyfast_ppo::Float16;

namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr int kSector = 32;  // bytes that travel together
constexpr int kNobody = -1;

int first_lane(uint32_t mask) { return __builtin_ctz(mask); }

template <class F>
void for_lanes(uint32_t mask, F f) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kWarp; ++lane) f(lane);
  } else {
    for (; mask != 0; mask &= mask - 1) f(first_lane(mask));
  }
}

// --- the program
// ------------------------------------------------------------------------------------------------------

struct Machine;
struct Block;
struct Warp;

enum class Kind { kPlain, kBranch, kExit, kBarrier, kTogether };  // kTogether: waits for the lanes of its warp

struct Instruction {
  std::string mnemonic, text;
  int guard = kNobody;  // a predicate's register
  bool guard_negated = false;
  std::vector<int> to, of;  // registers; constants are registers, too
  int64_t offset = 0;       // of an address, in bytes
  int target = 0;           // of a branch
  Kind kind = Kind::kPlain;
  std::function<void(Block&, Warp&, uint32_t)> run;
};

// --- state
// ------------------------------------------------------------------------------------------------------------

// Which thread touched a byte, and when: barriers of the block and of the warp before that.
struct Mark {
  int block = kNobody;
  int thread = kNobody;
  int epoch = 0;
  int warp_epoch = 0;
};

struct Range {
  std::string name;
  uint64_t begin = 0, end = 0;
  std::vector<Mark> writes;  // of each byte, once there is one
};

struct SharedByte {
  Mark write;
  Mark read;                   // one of those since the last barrier
  uint32_t reading_warps = 0;  // all of those
  uint8_t value = 0;
};

// What a thread knows to be visible of other blocks' writes: up to which barrier of theirs.
using Knowledge = std::vector<int>;

struct Warp {
  int index = 0;
  std::vector<uint64_t> registers;  // [register][lane]
  std::array<uint32_t, kWarp> pc{};
  uint32_t alive = 0, at_barrier = 0, waiting = 0;
  int epoch = 0;

  template <class T>
  T get(int reg, int lane) const {
    T value;
    std::memcpy(&value, &registers[static_cast<size_t>(reg) * kWarp + lane], sizeof value);
    return value;
  }
  template <class T>
  void set(int reg, int lane, T value) {
    if (reg == kNobody) return;
    // a GPU has one NaN; a CPU hands on one of the operands', and which one depends on their order
    if constexpr (std::is_floating_point_v<T>) {
      if (value != value) value = std::numeric_limits<T>::quiet_NaN();
    }
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    registers[static_cast<size_t>(reg) * kWarp + lane] = bits;
  }
  uint32_t ready() const { return alive & ~at_barrier & ~waiting; }
};

struct Block {
  Machine* machine = nullptr;
  int index = 0;
  int epoch = 1;
  std::vector<Warp> warps;
  std::vector<SharedByte> shared;
  Knowledge known;                    // by all threads
  std::map<int, Knowledge> acquired;  // by one thread, since the last barrier
  bool done() const {
    return std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.alive == 0; });
  }
};

struct Counts {
  int64_t instructions = 0, barriers = 0, atomics = 0;
  int64_t load_bytes = 0, load_sectors = 0, store_bytes = 0, store_sectors = 0;
  int64_t prefetched_bytes = 0;
};

struct Machine {
  explicit Machine(const std::vector<Instruction>& instructions) : code(instructions) {}

  const std::vector<Instruction>& code;
  int num_registers = 0;
  std::vector<std::pair<int, uint64_t>> constants;
  std::vector<uint8_t> parameters;
  std::vector<Range> ranges;
  size_t last_range = 0;
  size_t shared_bytes = 0;
  int num_blocks = 0, num_threads = 0;
  std::unordered_map<uint64_t, Knowledge> released;  // by address of the atomic
  std::minstd_rand random;
  Counts counts;

  int below(int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }

  Range& range_of(uint64_t address, size_t size) {
    for (size_t i = 0; i <= ranges.size(); ++i) {
      const size_t at = i == 0 ? last_range : i - 1;
      if (at < ranges.size() && address >= ranges[at].begin && address + size <= ranges[at].end) {
        return ranges[last_range = at];
      }
    }
    uint64_t nearest = std::numeric_limits<uint64_t>::max();
    std::string name = "any tensor";
    for (const Range& r : ranges) {
      const uint64_t distance = address < r.begin ? r.begin - address : address + size - r.end;
      if (distance < nearest) nearest = distance, name = r.name;
    }
    throw std::runtime_error("address outside of the tensors, " + std::to_string(nearest) + " bytes from " + name);
  }
};

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

int thread_of(const Warp& warp, int lane) { return warp.index * kWarp + lane; }

// Whether nothing orders an earlier access of this block against one of this thread now.
bool unordered_within(const Block& block, const Warp& warp, int lane, const Mark& earlier) {
  if (earlier.thread == kNobody || earlier.thread == thread_of(warp, lane) || earlier.epoch < block.epoch) return false;
  return earlier.thread / kWarp != warp.index || earlier.warp_epoch == warp.epoch;
}

std::string by_whom(const Mark& mark) {
  return "thread " + std::to_string(mark.thread) +
         (mark.block == kNobody ? "" : " of block " + std::to_string(mark.block));
}

// --- memory
// -----------------------------------------------------------------------------------------------------------

void check_alignment(uint64_t address, size_t size) {
  if (address % size != 0) fail("address not a multiple of " + std::to_string(size));
}

bool knows(const Block& block, int thread, const Mark& write) {
  if (block.known[write.block] > write.epoch) return true;
  const auto own = block.acquired.find(thread);
  return own != block.acquired.end() && own->second[write.block] > write.epoch;
}

void check_order(const Block& block, const Warp& warp, int lane, const Mark& write, const char* access) {
  if (write.thread == kNobody) return;
  const bool race = write.block == block.index ? unordered_within(block, warp, lane, write)
                                               : !knows(block, thread_of(warp, lane), write);
  if (race) fail(std::string("race in global memory: ") + access + " of what " + by_whom(write) + " writes");
}

void load_global(Block& block, Warp& warp, int lane, uint64_t address, void* to, size_t size, bool read_only) {
  Machine& machine = *block.machine;
  const Range& range = machine.range_of(address, size);
  if (!range.writes.empty()) {
    for (uint64_t i = address - range.begin; i < address - range.begin + size; ++i) {
      if (read_only && range.writes[i].thread != kNobody) fail("ld.global.nc of what this grid writes");
      check_order(block, warp, lane, range.writes[i], "read");
    }
  }
  std::memcpy(to, reinterpret_cast<const void*>(address), size);
}

void store_global(Block& block, Warp& warp, int lane, uint64_t address, const void* from, size_t size) {
  Range& range = block.machine->range_of(address, size);
  if (range.writes.empty()) range.writes.resize(range.end - range.begin);
  const Mark mine{block.index, thread_of(warp, lane), block.epoch, warp.epoch};
  const bool same = std::memcmp(reinterpret_cast<const void*>(address), from, size) == 0;
  for (uint64_t i = address - range.begin; i < address - range.begin + size; ++i) {
    if (!same) check_order(block, warp, lane, range.writes[i], "write");
    range.writes[i] = mine;
  }
  std::memcpy(reinterpret_cast<void*>(address), from, size);
}

void load_shared(Block& block, Warp& warp, int lane, uint64_t address, void* to, size_t size) {
  if (address + size > block.shared.size()) fail("read beyond shared memory");
  const Mark mine{kNobody, thread_of(warp, lane), block.epoch, warp.epoch};
  for (size_t i = 0; i < size; ++i) {
    SharedByte& byte = block.shared[address + i];
    if (byte.write.thread == kNobody) fail("read of shared memory that nobody wrote");
    if (unordered_within(block, warp, lane, byte.write)) {
      fail("race in shared memory: read of what " + by_whom(byte.write) + " writes");
    }
    if (byte.read.epoch < block.epoch) byte.reading_warps = 0;
    byte.read = mine;
    byte.reading_warps |= 1u << warp.index;
    static_cast<uint8_t*>(to)[i] = byte.value;
  }
}

void store_shared(Block& block, Warp& warp, int lane, uint64_t address, const void* from, size_t size) {
  if (address + size > block.shared.size()) fail("write beyond shared memory");
  const Mark mine{kNobody, thread_of(warp, lane), block.epoch, warp.epoch};
  for (size_t i = 0; i < size; ++i) {
    SharedByte& byte = block.shared[address + i];
    const uint8_t value = static_cast<const uint8_t*>(from)[i];
    const bool same = byte.write.thread != kNobody && byte.value == value;  // the order of equal writes does not matter
    if (!same && unordered_within(block, warp, lane, byte.write)) {
      fail("race in shared memory: write of what " + by_whom(byte.write) + " writes");
    }
    const bool read = byte.read.epoch == block.epoch && byte.read.thread != kNobody;
    const bool by_others = read && (byte.reading_warps & ~(1u << warp.index)) != 0;
    if (!same && (by_others || (read && unordered_within(block, warp, lane, byte.read)))) {
      fail("race in shared memory: write of what " + by_whom(byte.read) + " reads");
    }
    byte.write = mine;
    byte.value = value;
  }
}

// What one instruction of a warp reads or writes of global memory: different bytes, and sectors that hold them.
void count_traffic(const Warp& warp, uint32_t mask, int address_register, int64_t offset, size_t size, int64_t* bytes,
                   int64_t* sectors) {
  std::array<uint64_t, kWarp> addresses;
  size_t n = 0;
  for_lanes(mask, [&](int lane) { addresses[n++] = warp.get<uint64_t>(address_register, lane) + offset; });
  std::sort(addresses.begin(), addresses.begin() + n);
  const auto end = std::unique(addresses.begin(), addresses.begin() + n);
  uint64_t last = 0;  // an access is aligned to its size, and so lies within one sector
  for (auto address = addresses.begin(); address != end; ++address) {
    *bytes += static_cast<int64_t>(size);
    if (*address / kSector != last || address == addresses.begin()) ++*sectors;
    last = *address / kSector;
  }
}

// --- instructions
// -----------------------------------------------------------------------------------------------------

using Run = std::function<void(Block&, Warp&, uint32_t)>;
using Builder = std::function<Run(const Instruction&)>;

void expect_operands(const Instruction& i, size_t to, size_t of) {
  if (i.to.size() != to || i.of.size() != of)
    fail("unknown instruction " + i.mnemonic + " with these operands: " + i.text);
}

template <class To, class A, class F>
Builder unary(F f) {
  return [f](const Instruction& i) -> Run {
    expect_operands(i, 1, 1);
    return [f, to = i.to.at(0), a = i.of.at(0)](Block&, Warp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) { w.set<To>(to, lane, f(w.get<A>(a, lane))); });
    };
  };
}

template <class To, class A, class B, class F>
Builder binary(F f) {
  return [f](const Instruction& i) -> Run {
    expect_operands(i, 1, 2);
    return [f, to = i.to.at(0), a = i.of.at(0), b = i.of.at(1)](Block&, Warp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) { w.set<To>(to, lane, f(w.get<A>(a, lane), w.get<B>(b, lane))); });
    };
  };
}

template <class To, class A, class B, class C, class F>
Builder ternary(F f) {
  return [f](const Instruction& i) -> Run {
    expect_operands(i, 1, 3);
    return [f, to = i.to.at(0), a = i.of.at(0), b = i.of.at(1), c = i.of.at(2)](Block&, Warp& w, uint32_t mask) {
      for_lanes(mask,
                [&](int lane) { w.set<To>(to, lane, f(w.get<A>(a, lane), w.get<B>(b, lane), w.get<C>(c, lane))); });
    };
  };
}

Builder load(bool global, size_t element, size_t count, bool read_only) {
  return [=](const Instruction& i) -> Run {
    expect_operands(i, count, 1);
    return [=, to = i.to, address = i.of.at(0), offset = i.offset](Block& block, Warp& w, uint32_t mask) {
      const size_t size = element * count;
      Counts& counts = block.machine->counts;
      if (global) count_traffic(w, mask, address, offset, size, &counts.load_bytes, &counts.load_sectors);
      for_lanes(mask, [&](int lane) {
        std::array<uint8_t, 16> bytes;
        const uint64_t at = (global ? w.get<uint64_t>(address, lane) : w.get<uint32_t>(address, lane)) + offset;
        check_alignment(at, size);
        if (global) {
          load_global(block, w, lane, at, bytes.data(), size, read_only);
        } else {
          load_shared(block, w, lane, at, bytes.data(), size);
        }
        for (size_t k = 0; k < count; ++k) {
          uint64_t value = 0;
          std::memcpy(&value, &bytes[k * element], element);
          w.set(to.at(k), lane, value);
        }
      });
    };
  };
}

Builder store(bool global, size_t element, size_t count) {
  return [=](const Instruction& i) -> Run {
    expect_operands(i, 0, 1 + count);
    return [=, of = i.of, offset = i.offset](Block& block, Warp& w, uint32_t mask) {
      const size_t size = element * count;
      Counts& counts = block.machine->counts;
      if (global) count_traffic(w, mask, of.at(0), offset, size, &counts.store_bytes, &counts.store_sectors);
      for_lanes(mask, [&](int lane) {
        std::array<uint8_t, 16> bytes;
        for (size_t k = 0; k < count; ++k) {
          const uint64_t value = w.get<uint64_t>(of.at(1 + k), lane);
          std::memcpy(&bytes[k * element], &value, element);
        }
        const uint64_t at = (global ? w.get<uint64_t>(of[0], lane) : w.get<uint32_t>(of[0], lane)) + offset;
        check_alignment(at, size);
        if (global) {
          store_global(block, w, lane, at, bytes.data(), size);
        } else {
          store_shared(block, w, lane, at, bytes.data(), size);
        }
      });
    };
  };
}

// Asks for whole sixteens of bytes; the first may begin before the tensor whose bytes are wanted.
Builder prefetch() {
  return [](const Instruction& i) -> Run {
    expect_operands(i, 0, 2);
    return [address = i.of.at(0), bytes = i.of.at(1), offset = i.offset](Block& block, Warp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) {
        const uint64_t at = w.get<uint64_t>(address, lane) + offset;
        const uint32_t size = w.get<uint32_t>(bytes, lane);
        check_alignment(at, 16);
        if (size == 0 || size % 16 != 0) fail("a prefetch of " + std::to_string(size) + " bytes");
        block.machine->range_of(at + 15, size - 15);
        block.machine->counts.prefetched_bytes += size;
      });
    };
  };
}

Builder load_parameter(size_t element, size_t count) {
  return [=](const Instruction& i) -> Run {
    return [=, to = i.to, address = i.of.at(0), offset = i.offset](Block& block, Warp& w, uint32_t mask) {
      const std::vector<uint8_t>& parameters = block.machine->parameters;
      for_lanes(mask, [&](int lane) {
        const uint64_t at = w.get<uint64_t>(address, lane) + offset;
        check_alignment(at, element * count);
        if (at + element * count > parameters.size()) fail("read beyond the parameters");
        for (size_t k = 0; k < count; ++k) {
          uint64_t value = 0;
          std::memcpy(&value, &parameters[at + k * element], element);
          w.set(to.at(k), lane, value);
        }
      });
    };
  };
}

// Adds at an address that all blocks share; with acquire and release, what its block wrote before the last barrier is
// known to the next block that does the same.
template <class F>
Builder atomic_global(F f) {
  return [f](const Instruction& i) -> Run {
    return
        [f, to = i.to.empty() ? kNobody : i.to[0], of = i.of, offset = i.offset](Block& block, Warp& w, uint32_t mask) {
          Machine& machine = *block.machine;
          for_lanes(mask, [&](int lane) {
            const uint64_t at = w.get<uint64_t>(of.at(0), lane) + offset;
            check_alignment(at, sizeof(uint32_t));
            machine.range_of(at, sizeof(uint32_t));
            auto* const memory = reinterpret_cast<uint32_t*>(at);
            const uint32_t before = *memory;
            *memory = f(before, w.get<uint32_t>(of.at(1), lane));
            w.set(to, lane, before);
            ++machine.counts.atomics;
            Knowledge& passed_on = machine.released[at];
            passed_on.resize(machine.num_blocks, 0);
            Knowledge& mine = block.acquired[thread_of(w, lane)];
            mine.resize(machine.num_blocks, 0);
            for (int b = 0; b < machine.num_blocks; ++b) {
              passed_on[b] = mine[b] = std::max({passed_on[b], mine[b], block.known[b]});
            }
            passed_on[block.index] = block.epoch;
          });
        };
  };
}

Builder atomic_or_shared() {
  return [](const Instruction& i) -> Run {
    return [to = i.to.at(0), of = i.of, offset = i.offset](Block& block, Warp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) {
        const uint64_t at = w.get<uint32_t>(of.at(0), lane) + offset;
        check_alignment(at, sizeof(uint32_t));
        uint32_t before = 0;
        for (size_t k = 0; k < sizeof before; ++k) {
          SharedByte& byte = block.shared.at(at + k);
          if (byte.write.thread == kNobody) fail("atomic on shared memory that nobody wrote");
          if (unordered_within(block, w, lane, byte.write)) {
            fail("race in shared memory: atomic on what " + by_whom(byte.write) + " writes");
          }
          reinterpret_cast<uint8_t*>(&before)[k] = byte.value;
        }
        const uint32_t after = before | w.get<uint32_t>(of.at(1), lane);
        for (size_t k = 0; k < sizeof before; ++k) {
          block.shared[at + k].value = reinterpret_cast<const uint8_t*>(&after)[k];
        }
        w.set(to, lane, before);
      });
    };
  };
}

// PTX ISA 9.7.9.6. ``peer``: (lane, argument, first and last lane of the segment) -> whose value, and whether it
// exists.
template <class F>
Builder shuffle(F peer) {
  return [peer](const Instruction& i) -> Run {
    return [peer, to = i.to, of = i.of](Block&, Warp& w, uint32_t mask) {
      std::array<uint32_t, kWarp> given{};
      for_lanes(mask, [&](int lane) { given[lane] = w.get<uint32_t>(of.at(0), lane); });
      for_lanes(mask, [&](int lane) {
        const uint32_t members = w.get<uint32_t>(of.at(3), lane);
        if ((members >> lane & 1u) == 0) fail("shfl.sync by a lane that its mask leaves out");
        const uint32_t c = w.get<uint32_t>(of.at(2), lane);
        const int segment = static_cast<int>(c >> 8 & 31u), clamp = static_cast<int>(c & 31u);
        const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
        const auto [from, exists] =
            peer(lane, static_cast<int>(w.get<uint32_t>(of.at(1), lane) & 31u), first, last, segment);
        const int source = exists ? from : lane;
        if ((mask >> source & 1u) == 0) fail("shfl.sync from a lane that does not take part");
        w.set(to.at(0), lane, given[source]);
        if (to.size() > 1) w.set<uint64_t>(to[1], lane, exists);
      });
    };
  };
}

// PTX ISA 9.7.14.5.15: rows of 8 numbers of 16 bits, whose addresses 8 lanes give for each of ``count`` matrices; lane
// t has the numbers 2 (t mod 4) and the next of row t / 4.
Builder matrices(bool loads, int count) {
  return [=](const Instruction& i) -> Run {
    return [=, to = i.to, of = i.of, offset = i.offset](Block& block, Warp& w, uint32_t mask) {
      if (mask != kAllLanes) fail("ldmatrix or stmatrix without all lanes");
      for (int m = 0; m < count; ++m) {
        for (int lane = 0; lane < kWarp; ++lane) {
          const uint64_t row = w.get<uint32_t>(of.at(0), 8 * m + lane / 4) + offset;
          check_alignment(row, 16);
          uint32_t pair = loads ? 0 : w.get<uint32_t>(of.at(1 + m), lane);
          if (loads) {
            load_shared(block, w, lane, row + 4 * (lane % 4), &pair, sizeof pair);
            w.set(to.at(m), lane, pair);
          } else {
            store_shared(block, w, lane, row + 4 * (lane % 4), &pair, sizeof pair);
          }
        }
      }
    };
  };
}

// PTX ISA 9.7.14.6. ``join`` of what all lanes give.
template <class T, class F>
Builder reduce(F join) {
  return [join](const Instruction& i) -> Run {
    return [join, to = i.to.at(0), of = i.of](Block&, Warp& w, uint32_t mask) {
      T result = w.get<T>(of.at(0), first_lane(mask));
      for_lanes(mask, [&](int lane) { result = join(result, w.get<T>(of.at(0), lane)); });
      for_lanes(mask, [&](int lane) {
        if (w.get<uint32_t>(of.at(1), lane) != mask)
          fail("redux.sync whose mask is not that of the lanes that take part");
        w.set(to, lane, result);
      });
    };
  };
}

template <class T>
T shift_left(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(x << n);
}
template <class T>
T shift_right(T x, uint32_t n) {
  if (n >= 8 * sizeof(T)) return std::is_signed_v<T> && x < 0 ? T(-1) : T(0);
  return static_cast<T>(x >> n);
}
template <class T>
T bit_field(T x, uint32_t position, uint32_t length) {
  position &= 255u, length &= 255u;
  if (length == 0) return 0;
  using Bits = std::make_unsigned_t<T>;
  const uint32_t width = 8 * sizeof(T);
  const uint32_t last = std::min(position + length - 1, width - 1);
  const bool negative = std::is_signed_v<T> && (static_cast<Bits>(x) >> last & 1u) != 0;
  Bits out = negative ? ~Bits(0) : Bits(0);
  for (uint32_t k = 0; k < length && k < width; ++k) {
    if (position + k >= width) break;
    const Bits bit = static_cast<Bits>(x) >> (position + k) & 1u;
    out = static_cast<Bits>((out & ~(Bits(1) << k)) | bit << k);
  }
  return static_cast<T>(out);
}

// PTX ISA 9.7.9.7: each nibble of ``which`` names one of the eight bytes of (high, low); its top bit, their sign.
uint32_t permuted(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t selector = which >> 4 * k & 15u;
    const uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (selector & 7u)) & 255u;
    out |= ((selector & 8u) == 0 ? byte : (byte >> 7) * 255u) << 8 * k;
  }
  return out;
}

template <class Narrow>
float widened(uint16_t bits) {
  return pyfast_ppo::to_float(Narrow{bits});
}
template <class Narrow>
uint16_t narrowed(float x) {
  Narrow out;
  pyfast_ppo::from_float(x, &out);
  return out.bits;
}

class Table {
 public:
  Table() {
    for_integers<uint16_t>("u16"), for_integers<int16_t>("s16");
    for_integers<uint32_t>("u32"), for_integers<int32_t>("s32");
    for_integers<uint64_t>("u64"), for_integers<int64_t>("s64");
    for_bits<uint16_t>("16"), for_bits<uint32_t>("32"), for_bits<uint64_t>("64");
    for_floats<float>("f32"), for_floats<double>("f64");
    pairs();
    add("prmt.b32", ternary<uint32_t, uint32_t, uint32_t, uint32_t>(permuted));
    wide<int16_t, int32_t>("s16"), wide<uint16_t, uint32_t>("u16");
    wide<int32_t, int64_t>("s32"), wide<uint32_t, uint64_t>("u32");
    comparisons_of_narrow<BFloat16>("bf16"), comparisons_of_narrow<Float16>("f16");
    predicates();
    conversions();
    memory();
    control();
    // rounded in other ways than is asked of them here; what a GPU gives is within 2 units in the last place
    add("div.full.f32", binary<float, float, float>([](float a, float b) { return a / b; }));
    // the first 20 bits of the result, as nvcc's division begins
    add("rcp.approx.ftz.f64", unary<uint64_t, double>([](double a) {
          const double r = 1.0 / a;
          uint64_t bits;
          std::memcpy(&bits, &r, sizeof bits);
          return bits & 0xffffffff00000000ull;
        }));
  }

  const Builder& operator[](const std::string& mnemonic) const {
    const auto found = builders_.find(mnemonic);
    if (found == builders_.end()) fail("unknown instruction " + mnemonic);
    return found->second;
  }

 private:
  void add(const std::string& mnemonic, Builder builder) { builders_[mnemonic] = std::move(builder); }

  template <class T>
  void for_integers(const std::string& t) {
    using U = std::make_unsigned_t<T>;  // which wraps around
    add("add." + t, binary<T, T, T>([](T a, T b) { return static_cast<T>(U(a) + U(b)); }));
    add("sub." + t, binary<T, T, T>([](T a, T b) { return static_cast<T>(U(a) - U(b)); }));
    add("mul.lo." + t, binary<T, T, T>([](T a, T b) { return static_cast<T>(uint64_t(a) * uint64_t(b)); }));
    add("mad.lo." + t,
        ternary<T, T, T, T>([](T a, T b, T c) { return static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c)); }));
    add("div." + t, binary<T, T, T>([](T a, T b) { return b == 0 ? static_cast<T>(-1) : static_cast<T>(a / b); }));
    add("rem." + t, binary<T, T, T>([](T a, T b) { return b == 0 ? a : static_cast<T>(a % b); }));
    add("neg." + t, unary<T, T>([](T a) { return static_cast<T>(U(0) - U(a)); }));
    add("min." + t, binary<T, T, T>([](T a, T b) { return std::min(a, b); }));
    add("max." + t, binary<T, T, T>([](T a, T b) { return std::max(a, b); }));
    add("shr." + t, binary<T, T, uint32_t>(shift_right<T>));
    add("bfe." + t, ternary<T, T, uint32_t, uint32_t>(bit_field<T>));
    compare<T>("eq", t, [](T a, T b) { return a == b; }), compare<T>("ne", t, [](T a, T b) { return a != b; });
    compare<T>("lt", t, [](T a, T b) { return a < b; }), compare<T>("le", t, [](T a, T b) { return a <= b; });
    compare<T>("gt", t, [](T a, T b) { return a > b; }), compare<T>("ge", t, [](T a, T b) { return a >= b; });
  }

  template <class T>
  void for_bits(const std::string& width) {
    add("and.b" + width, binary<T, T, T>([](T a, T b) { return static_cast<T>(a & b); }));
    add("or.b" + width, binary<T, T, T>([](T a, T b) { return static_cast<T>(a | b); }));
    add("xor.b" + width, binary<T, T, T>([](T a, T b) { return static_cast<T>(a ^ b); }));
    add("not.b" + width, unary<T, T>([](T a) { return static_cast<T>(~a); }));
    add("shl.b" + width, binary<T, T, uint32_t>(shift_left<T>));
    compare<T>("eq", "b" + width, [](T a, T b) { return a == b; });
    compare<T>("ne", "b" + width, [](T a, T b) { return a != b; });
    for (const char* letter : {"b", "u", "s", "f"}) {
      add("mov." + (letter + width), unary<T, T>([](T a) { return a; }));
      add("selp." + (letter + width), ternary<T, T, T, uint64_t>([](T a, T b, uint64_t p) { return p ? a : b; }));
    }
    // two halves in braces
    using Half = std::conditional_t<sizeof(T) == 8, uint32_t, std::conditional_t<sizeof(T) == 4, uint16_t, uint8_t>>;
    constexpr int kHalf = 8 * sizeof(Half);
    add("pack.b" + width, binary<T, Half, Half>([](Half low, Half high) {
          return static_cast<T>(static_cast<uint64_t>(high) << kHalf | low);
        }));
    add("unpack.b" + width, [](const Instruction& i) -> Run {
      return [low = i.to.at(0), high = i.to.at(1), a = i.of.at(0)](Block&, Warp& w, uint32_t mask) {
        for_lanes(mask, [&](int lane) {
          const T value = w.get<T>(a, lane);
          w.set(low, lane, static_cast<Half>(value));
          w.set(high, lane, static_cast<Half>(value >> kHalf));
        });
      };
    });
  }

  template <class T>
  void for_floats(const std::string& t) {
    for (const char* rounding : {".", ".rn."}) {
      add("add" + (rounding + t), binary<T, T, T>([](T a, T b) { return a + b; }));
      add("sub" + (rounding + t), binary<T, T, T>([](T a, T b) { return a - b; }));
      add("mul" + (rounding + t), binary<T, T, T>([](T a, T b) { return a * b; }));
    }
    add("fma.rn." + t, ternary<T, T, T, T>([](T a, T b, T c) { return std::fma(a, b, c); }));
    add("div.rn." + t, binary<T, T, T>([](T a, T b) { return a / b; }));
    add("rcp.rn." + t, unary<T, T>([](T a) { return T(1) / a; }));
    add("sqrt.rn." + t, unary<T, T>([](T a) { return std::sqrt(a); }));
    add("neg." + t, unary<T, T>([](T a) { return -a; }));
    add("abs." + t, unary<T, T>([](T a) { return std::fabs(a); }));
    add("copysign." + t, binary<T, T, T>([](T a, T b) { return std::copysign(b, a); }));  // the sign is the first's
    either_of_two_or_three<T>("min." + t, [](T a, T b) { return std::fmin(a, b); });
    either_of_two_or_three<T>("max." + t, [](T a, T b) { return std::fmax(a, b); });
    compare_floats<T>(t, [](T a) { return a; });
  }

  // three since Blackwell
  template <class T, class F>
  void either_of_two_or_three(const std::string& mnemonic, F f) {
    const Builder two = binary<T, T, T>(f);
    const Builder three = ternary<T, T, T, T>([f](T a, T b, T c) { return f(f(a, b), c); });
    add(mnemonic, [two, three](const Instruction& i) { return i.of.size() == 3 ? three(i) : two(i); });
  }

  // two float32 in a register of 64 bits (Blackwell)
  void pairs() {
    struct Pair {
      float low, high;
    };
    for (const std::string end : {".f32x2", ".rn.f32x2"}) {
      add("add" + end, binary<Pair, Pair, Pair>([](Pair a, Pair b) { return Pair{a.low + b.low, a.high + b.high}; }));
      add("sub" + end, binary<Pair, Pair, Pair>([](Pair a, Pair b) { return Pair{a.low - b.low, a.high - b.high}; }));
      add("mul" + end, binary<Pair, Pair, Pair>([](Pair a, Pair b) { return Pair{a.low * b.low, a.high * b.high}; }));
    }
    add("fma.rn.f32x2", ternary<Pair, Pair, Pair, Pair>([](Pair a, Pair b, Pair c) {
          return Pair{std::fma(a.low, b.low, c.low), std::fma(a.high, b.high, c.high)};
        }));
  }

  template <class Narrow>
  void comparisons_of_narrow(const std::string& t) {
    compare_floats<uint16_t>(t, widened<Narrow>);
  }

  template <class T, class Value>
  void compare_floats(const std::string& t, Value v) {
    compare<T>("eq", t, [v](T a, T b) { return v(a) == v(b); });
    compare<T>("ne", t, [v](T a, T b) { return v(a) < v(b) || v(a) > v(b); });
    compare<T>("lt", t, [v](T a, T b) { return v(a) < v(b); });
    compare<T>("le", t, [v](T a, T b) { return v(a) <= v(b); });
    compare<T>("gt", t, [v](T a, T b) { return v(a) > v(b); });
    compare<T>("ge", t, [v](T a, T b) { return v(a) >= v(b); });
    compare<T>("equ", t, [v](T a, T b) { return !(v(a) < v(b) || v(a) > v(b)); });
    compare<T>("neu", t, [v](T a, T b) { return v(a) != v(b); });
    compare<T>("ltu", t, [v](T a, T b) { return !(v(a) >= v(b)); });
    compare<T>("leu", t, [v](T a, T b) { return !(v(a) > v(b)); });
    compare<T>("gtu", t, [v](T a, T b) { return !(v(a) <= v(b)); });
    compare<T>("geu", t, [v](T a, T b) { return !(v(a) < v(b)); });
    compare<T>("num", t, [v](T a, T b) { return v(a) == v(a) && v(b) == v(b); });
    compare<T>("nan", t, [v](T a, T b) { return v(a) != v(a) || v(b) != v(b); });
  }

  template <class T, class F>
  void compare(const std::string& how, const std::string& t, F f) {
    add("setp." + how + "." + t, binary<uint64_t, T, T>([f](T a, T b) { return static_cast<uint64_t>(f(a, b)); }));
    if constexpr (sizeof(T) == 2) {  // two of them, a predicate for each
      add("setp." + how + "." + t + "x2", [f](const Instruction& i) -> Run {
        return [f, to = i.to, a = i.of.at(0), b = i.of.at(1)](Block&, Warp& w, uint32_t mask) {
          for_lanes(mask, [&](int lane) {
            for (int half = 0; half < 2; ++half) {
              const T x = static_cast<T>(w.get<uint32_t>(a, lane) >> 16 * half);
              const T y = static_cast<T>(w.get<uint32_t>(b, lane) >> 16 * half);
              w.set(to.at(half), lane, static_cast<uint64_t>(f(x, y)));
            }
          });
        };
      });
    }
  }

  template <class T, class Wide>
  void wide(const std::string& t) {
    add("mul.wide." + t, binary<Wide, T, T>([](T a, T b) { return static_cast<Wide>(a) * static_cast<Wide>(b); }));
    add("mad.wide." + t, ternary<Wide, T, T, Wide>([](T a, T b, Wide c) {
          return static_cast<Wide>(uint64_t(Wide(a) * Wide(b)) + uint64_t(c));
        }));
    add("mul.hi." + t,
        binary<T, T, T>([](T a, T b) { return static_cast<T>((Wide(a) * Wide(b)) >> (8 * sizeof(T))); }));
  }

  void predicates() {
    using P = uint64_t;
    add("and.pred", binary<P, P, P>([](P a, P b) { return P(a != 0 && b != 0); }));
    add("or.pred", binary<P, P, P>([](P a, P b) { return P(a != 0 || b != 0); }));
    add("xor.pred", binary<P, P, P>([](P a, P b) { return P((a != 0) != (b != 0)); }));
    add("not.pred", unary<P, P>([](P a) { return P(a == 0); }));
    add("mov.pred", unary<P, P>([](P a) { return P(a != 0); }));
  }

  template <class From>
  void integer_conversions(const std::string& from) {
    const auto to = [&](const char* name, auto zero) {
      using To = decltype(zero);
      add(std::string("cvt.") + name + "." + from, unary<To, From>([](From a) { return static_cast<To>(a); }));
    };
    to("u8", uint8_t()), to("s8", int8_t()), to("u16", uint16_t()), to("s16", int16_t());
    to("u32", uint32_t()), to("s32", int32_t()), to("u64", uint64_t()), to("s64", int64_t());
    to("rn.f32", float()), to("rn.f64", double());
  }

  void conversions() {
    integer_conversions<uint8_t>("u8"), integer_conversions<int8_t>("s8");
    integer_conversions<uint16_t>("u16"), integer_conversions<int16_t>("s16");
    integer_conversions<uint32_t>("u32"), integer_conversions<int32_t>("s32");
    integer_conversions<uint64_t>("u64"), integer_conversions<int64_t>("s64");
    add("cvt.f64.f32", unary<double, float>([](float a) { return static_cast<double>(a); }));
    // negative numbers become 0, what is too large the largest number, NaN 0
    add("cvt.rzi.u32.f32", unary<uint32_t, float>([](float a) {
          return a >= 4294967296.0f ? 0xffffffffu : (a > 0.0f ? static_cast<uint32_t>(a) : 0u);
        }));
    add("cvt.rn.f32.f64", unary<float, double>([](double a) { return static_cast<float>(a); }));
    narrow<BFloat16>("bf16"), narrow<Float16>("f16");
  }

  template <class Narrow>
  void narrow(const std::string& t) {
    add("cvt.f32." + t, unary<float, uint16_t>(widened<Narrow>));
    add("cvt.f64." + t, unary<double, uint16_t>([](uint16_t a) { return static_cast<double>(widened<Narrow>(a)); }));
    for (const std::string rounding : {".", ".rn."}) {  // the first operand is narrow (Blackwell)
      add("add" + rounding + "f32." + t,
          binary<float, uint16_t, float>([](uint16_t a, float b) { return widened<Narrow>(a) + b; }));
      add("sub" + rounding + "f32." + t,
          binary<float, uint16_t, float>([](uint16_t a, float b) { return widened<Narrow>(a) - b; }));
    }
    add("fma.rn.f32." + t, ternary<float, uint16_t, uint16_t, float>([](uint16_t a, uint16_t b, float c) {
          return std::fma(widened<Narrow>(a), widened<Narrow>(b), c);
        }));
    add("cvt.rn." + t + ".f32", unary<uint16_t, float>(narrowed<Narrow>));
    add("cvt.rn." + t + "x2.f32", binary<uint32_t, float, float>([](float high, float low) {
          return static_cast<uint32_t>(narrowed<Narrow>(high)) << 16 | narrowed<Narrow>(low);
        }));
  }

  void memory() {
    for (const auto& [bits, bytes] : std::map<std::string, size_t>{{"8", 1}, {"16", 2}, {"32", 4}, {"64", 8}}) {
      for (const char* letter : {"b", "u", "s", "f"}) {
        for (const auto& [vector, count] : std::map<std::string, size_t>{{".", 1}, {".v2.", 2}, {".v4.", 4}}) {
          const std::string type = vector + letter + bits;
          add("ld.param" + type, load_parameter(bytes, count));
          if (bytes * count > 16) continue;
          add("ld.global" + type, load(true, bytes, count, false));
          add("ld.global.cg" + type, load(true, bytes, count, false));
          add("ld.global.nc" + type, load(true, bytes, count, true));
          add("ld.shared" + type, load(false, bytes, count, false));
          add("st.global" + type, store(true, bytes, count));
          add("st.shared" + type, store(false, bytes, count));
          add("st.shared::cta" + type, store(false, bytes, count));
        }
      }
    }
    const auto sum = [](uint32_t a, uint32_t b) { return a + b; };
    add("atom.global.gpu.acq_rel.add.u32", atomic_global(sum));
    add("atom.acq_rel.gpu.inc.u32", atomic_global([](uint32_t a, uint32_t most) { return a >= most ? 0 : a + 1; }));
    add("atom.shared.or.b32", atomic_or_shared());
    for (const auto& [name, count] : std::map<std::string, int>{{"x1", 1}, {"x2", 2}, {"x4", 4}}) {
      add("ldmatrix.sync.aligned.m8n8." + name + ".shared.b16", matrices(true, count));
      add("stmatrix.sync.aligned.m8n8." + name + ".shared.b16", matrices(false, count));
    }
    add("cp.async.bulk.prefetch.L2.global", prefetch());
    add("cvta.to.global.u64", unary<uint64_t, uint64_t>([](uint64_t a) { return a; }));
  }

  void control() {
    using Peer = std::pair<int, bool>;
    add("shfl.sync.up.b32",
        shuffle([](int lane, int b, int, int last, int) { return Peer(lane - b, lane - b >= last); }));
    add("shfl.sync.down.b32",
        shuffle([](int lane, int b, int, int last, int) { return Peer(lane + b, lane + b <= last); }));
    add("shfl.sync.bfly.b32",
        shuffle([](int lane, int b, int, int last, int) { return Peer(lane ^ b, (lane ^ b) <= last); }));
    add("shfl.sync.idx.b32", shuffle([](int, int b, int first, int last, int segment) {
          const int from = first | (b & ~segment);
          return Peer(from, from <= last);
        }));
    add("redux.sync.max.f32", reduce<float>([](float a, float b) { return std::fmax(a, b); }));
    add("redux.sync.min.f32", reduce<float>([](float a, float b) { return std::fmin(a, b); }));
    const Builder nothing = [](const Instruction&) -> Run { return [](Block&, Warp&, uint32_t) {}; };
    for (const char* name : {"bra", "bra.uni", "ret", "exit", "bar.sync", "bar.warp.sync"}) add(name, nothing);
  }

  std::unordered_map<std::string, Builder> builders_;
};

Kind kind_of(const std::string& mnemonic) {
  const auto begins = [&](const char* with) { return mnemonic.rfind(with, 0) == 0; };
  if (begins("bra")) return Kind::kBranch;
  if (mnemonic == "ret" || mnemonic == "exit") return Kind::kExit;
  if (mnemonic == "bar.sync") return Kind::kBarrier;
  if (begins("shfl.sync") || begins("redux.sync") || begins("bar.warp.sync") || begins("ldmatrix") ||
      begins("stmatrix"))
    return Kind::kTogether;
  return Kind::kPlain;
}

// --- running
// ----------------------------------------------------------------------------------------------------------

uint32_t lanes_allowed(const Instruction& i, const Warp& warp, uint32_t mask) {
  if (i.guard == kNobody) return mask;
  uint32_t allowed = 0;
  for_lanes(mask, [&](int lane) {
    if ((warp.get<uint64_t>(i.guard, lane) != 0) != i.guard_negated) allowed |= 1u << lane;
  });
  return allowed;
}

void move_to(Warp& warp, uint32_t mask, uint32_t pc) {
  for_lanes(mask, [&](int lane) { warp.pc[lane] = pc; });
}

// The lanes that are ready and furthest behind, so that those which branched apart meet again.
uint32_t next_group(const Warp& warp) {
  const uint32_t ready = warp.ready();
  uint32_t behind = std::numeric_limits<uint32_t>::max(), group = 0;
  for_lanes(ready, [&](int lane) {
    if (warp.pc[lane] < behind) behind = warp.pc[lane], group = 0;
    if (warp.pc[lane] == behind) group |= 1u << lane;
  });
  return group;
}

void step(Block& block, Warp& warp) {
  Machine& machine = *block.machine;
  uint32_t group = next_group(warp);
  const uint32_t pc = warp.pc[first_lane(group)];
  const Instruction& i = machine.code[pc];
  try {
    const uint32_t mask = lanes_allowed(i, warp, group);
    ++machine.counts.instructions;
    switch (i.kind) {
      case Kind::kBranch:
        move_to(warp, group & ~mask, pc + 1);
        move_to(warp, mask, static_cast<uint32_t>(i.target));
        return;
      case Kind::kExit:
        move_to(warp, group, pc + 1);
        warp.alive &= ~mask;
        return;
      case Kind::kBarrier:
        move_to(warp, group, pc + 1);
        warp.at_barrier |= mask;
        return;
      case Kind::kTogether: {
        if (i.guard != kNobody) fail("a guard before an instruction of the whole warp");
        uint32_t arrived = group;
        for_lanes(warp.waiting, [&](int lane) { arrived |= warp.pc[lane] == pc ? 1u << lane : 0u; });
        if (arrived != warp.alive) {
          warp.waiting |= group;
          if (warp.ready() == 0 && warp.at_barrier != 0)
            fail("some lanes of a warp wait at a barrier, some for each other");
          return;
        }
        warp.waiting &= ~arrived;
        if (i.mnemonic == "bar.warp.sync") ++warp.epoch;  // shuffles order no accesses to memory
        i.run(block, warp, arrived);
        move_to(warp, arrived, pc + 1);
        return;
      }
      case Kind::kPlain:
        i.run(block, warp, mask);
        move_to(warp, group, pc + 1);
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(error.what()) + "\n  at: " + i.text + "\n  in block " +
                             std::to_string(block.index) + ", warp " + std::to_string(warp.index));
  }
}

std::unique_ptr<Block> start(Machine& machine, int index) {
  auto block = std::make_unique<Block>();
  block->machine = &machine;
  block->index = index;
  block->known.assign(machine.num_blocks, 0);
  block->shared.resize(machine.shared_bytes);
  block->warps.resize((machine.num_threads + kWarp - 1) / kWarp);
  for (size_t w = 0; w < block->warps.size(); ++w) {
    Warp& warp = block->warps[w];
    warp.index = static_cast<int>(w);
    const int lanes = std::min(kWarp, machine.num_threads - static_cast<int>(w) * kWarp);
    warp.alive = lanes == kWarp ? kAllLanes : (1u << lanes) - 1;
    warp.registers.assign(static_cast<size_t>(machine.num_registers) * kWarp, 0xdeadbeefdeadbeefull);
    for (const auto& [reg, value] : machine.constants) {
      for (int lane = 0; lane < kWarp; ++lane) warp.set(reg, lane, value);
    }
    // the special registers come first: %tid.x, %ctaid.x, %ntid.x, %nctaid.x
    for (int lane = 0; lane < kWarp; ++lane) {
      warp.set<uint64_t>(0, lane, static_cast<uint64_t>(thread_of(warp, lane)));
      warp.set<uint64_t>(1, lane, static_cast<uint64_t>(index));
      warp.set<uint64_t>(2, lane, static_cast<uint64_t>(machine.num_threads));
      warp.set<uint64_t>(3, lane, static_cast<uint64_t>(machine.num_blocks));
    }
  }
  return block;
}

// Lets the block's threads go if all of them are at the barrier.
bool pass_barrier(Block& block) {
  bool any = false;
  for (const Warp& w : block.warps) {
    if (w.at_barrier != w.alive) return false;
    any = any || w.alive != 0;
  }
  if (!any) return false;
  for (Warp& w : block.warps) w.at_barrier = 0;
  for (const auto& [thread, knowledge] : block.acquired) {
    for (size_t b = 0; b < knowledge.size(); ++b) block.known[b] = std::max(block.known[b], knowledge[b]);
  }
  block.acquired.clear();
  ++block.epoch;
  ++block.machine->counts.barriers;
  return true;
}

// A warp of the block goes on for a while; false if none can.
bool go_on(Block& block) {
  Machine& machine = *block.machine;
  std::vector<Warp*> ready;
  for (Warp& w : block.warps) {
    if (w.ready() != 0) ready.push_back(&w);
  }
  if (ready.empty()) return pass_barrier(block);
  Warp& warp = *ready[machine.below(static_cast<int>(ready.size()))];
  // now and then a warp is far ahead of the others, now and then they are close
  for (int left = 1 << machine.below(12); left > 0 && warp.ready() != 0; --left) step(block, warp);
  return true;
}

void run(Machine& machine, int side_by_side) {
  std::vector<int> waiting(machine.num_blocks);
  for (int b = 0; b < machine.num_blocks; ++b) waiting[b] = b;
  std::shuffle(waiting.begin(), waiting.end(), machine.random);
  std::vector<std::unique_ptr<Block>> running;
  while (!waiting.empty() || !running.empty()) {
    while (!waiting.empty() && static_cast<int>(running.size()) < side_by_side) {
      running.push_back(start(machine, waiting.back()));
      waiting.pop_back();
    }
    const int which = machine.below(static_cast<int>(running.size()));
    Block& block = *running[which];
    if (!go_on(block)) fail("the threads of block " + std::to_string(block.index) + " wait for each other");
    if (block.done()) running.erase(running.begin() + which);
  }
}

// --- Python
// -----------------------------------------------------------------------------------------------------------

class Program {
 public:
  // instructions: (mnemonic, guard or -1, whether it is negated, to, of, offset, target, text)
  using Row = std::tuple<std::string, int, bool, std::vector<int>, std::vector<int>, int64_t, int, std::string>;

  Program(const std::vector<Row>& rows, int num_registers, std::vector<std::pair<int, uint64_t>> constants)
      : num_registers_(num_registers), constants_(std::move(constants)) {
    static const Table table;
    for (const auto& [mnemonic, guard, negated, to, of, offset, target, text] : rows) {
      Instruction i{mnemonic, text, guard, negated, to, of, offset, target, kind_of(mnemonic), nullptr};
      i.run = table[mnemonic](i);
      code_.push_back(std::move(i));
    }
  }

  Counts run(int num_blocks, int num_threads, const std::string& parameters,
             const std::vector<std::tuple<std::string, uint64_t, uint64_t>>& ranges, size_t shared_bytes, unsigned seed,
             int side_by_side) const {
    Machine machine{code_};
    machine.num_registers = num_registers_;
    machine.constants = constants_;
    machine.parameters.assign(parameters.begin(), parameters.end());
    for (const auto& [name, begin, end] : ranges) machine.ranges.push_back({name, begin, end, {}});
    machine.shared_bytes = shared_bytes;
    machine.num_blocks = num_blocks;
    machine.num_threads = num_threads;
    machine.random.seed(seed);
    ::run(machine, side_by_side);
    return machine.counts;
  }

 private:
  std::vector<Instruction> code_;
  int num_registers_;
  std::vector<std::pair<int, uint64_t>> constants_;
};

}  // namespace

PYBIND11_MODULE(ptx_machine, m) {
  py::class_<Counts>(m, "Counts")
      .def_readonly("instructions", &Counts::instructions)
      .def_readonly("barriers", &Counts::barriers)
      .def_readonly("atomics", &Counts::atomics)
      .def_readonly("load_bytes", &Counts::load_bytes)
      .def_readonly("load_sectors", &Counts::load_sectors)
      .def_readonly("store_bytes", &Counts::store_bytes)
      .def_readonly("store_sectors", &Counts::store_sectors)
      .def_readonly("prefetched_bytes", &Counts::prefetched_bytes);
  py::class_<Program>(m, "Program")
      .def(py::init<const std::vector<Program::Row>&, int, std::vector<std::pair<int, uint64_t>>>())
      .def("run", [](const Program& program, int num_blocks, int num_threads, const py::bytes& parameters,
                     const std::vector<std::tuple<std::string, uint64_t, uint64_t>>& ranges, size_t shared_bytes,
                     unsigned seed, int side_by_side) {
        return program.run(num_blocks, num_threads, parameters, ranges, shared_bytes, seed, side_by_side);
      });
}
