// Sums and gathers over the ranks of one host, in memory that all of them have mapped.
//
//   lost                    0, or 1 + the rank that somebody gave up waiting for
//   arrived[rank]           pieces that a rank has published so far
//   slot[2][rank]           the last two pieces of every rank
//
// A piece: copy one's part into slot[number % 2][rank], publish its number, wait until all ranks have published it, and
// read everybody's slots. Two buffers make one wait enough: who writes piece n + 2 has seen all ranks publish n + 1,
// which they did after their last look at piece n.
//
// Every rank adds all parts in the order of ranks, so all get the same bits. Each reads all parts of the others, which
// for two ranks is no more than sharing the additions out and fetching the results would be.
//
// Compiled for the host by paceline/native.py.

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLine = 128;  // two cache lines: the CPU fetches pairs
constexpr int64_t kPage = 4096;
constexpr int64_t kBlock = 1024;           // floats that a thread adds at a time
constexpr int64_t kParallel = 1 << 15;     // floats from which several threads are worth their start
constexpr int kSpins = 4000;               // some 0.1 ms of looking, which is what ranks differ by
constexpr int64_t kYield = 5'000'000;      // ns, in which the core is offered to others, then given up
constexpr timespec kSleep = {0, 100'000};  // ns

static_assert(std::atomic<int64_t>::is_always_lock_free, "counters are shared between processes");

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

}  // namespace

extern "C" {

// One rank's view. `slot_bytes` is a multiple of a page, so that every slot can lie in its own rank's memory.
struct Group {
  char* memory;
  int64_t rank, size, slot_bytes, timeout_ns, pieces;
};

// Bytes of the mapping; and where in it a rank's slots begin, each slot_bytes long, the second `size` slots further on.
int64_t memory_bytes(int64_t size, int64_t slot_bytes) {
  return whole_pages((1 + size) * kLine) + 2 * size * slot_bytes;
}
int64_t slot_offset(int64_t size, int64_t slot_bytes, int64_t buffer, int64_t rank) {
  return whole_pages((1 + size) * kLine) + (buffer * size + rank) * slot_bytes;
}

}  // extern "C"

namespace {

std::atomic<int64_t>& counter(const Group& group, int64_t line) {
  return *reinterpret_cast<std::atomic<int64_t>*>(group.memory + line * kLine);
}
std::atomic<int64_t>& lost(const Group& group) { return counter(group, 0); }
std::atomic<int64_t>& arrived(const Group& group, int64_t rank) { return counter(group, 1 + rank); }

char* slot(const Group& group, int64_t rank) {
  return group.memory + slot_offset(group.size, group.slot_bytes, group.pieces % 2, rank);
}

// 0 once `rank` has published piece `number`, or 1 + the rank that is missing.
int64_t wait_for(const Group& group, int64_t rank, int64_t number) {
  const auto& there = arrived(group, rank);
  for (int turn = 0; turn < kSpins; ++turn) {
    if (there.load(std::memory_order_acquire) >= number) return 0;
    pause();
  }
  const int64_t began = now();
  while (there.load(std::memory_order_acquire) < number) {
    if (const int64_t missing = lost(group).load(std::memory_order_relaxed)) return missing;
    const int64_t waited = now() - began;
    if (waited > group.timeout_ns) {
      int64_t nobody = 0;
      lost(group).compare_exchange_strong(nobody, 1 + rank);
      return nobody ? nobody : 1 + rank;
    }
    if (waited < kYield) {
      sched_yield();
    } else {
      nanosleep(&kSleep, nullptr);
    }
  }
  return 0;
}

// Publishes this rank's slot and waits for all others'. 0, or 1 + the rank that is missing.
int64_t meet(const Group& group) {
  if (const int64_t missing = lost(group).load(std::memory_order_relaxed)) return missing;
  const int64_t number = group.pieces + 1;
  arrived(group, group.rank).store(number, std::memory_order_release);
  for (int64_t rank = 0; rank < group.size; ++rank) {
    if (rank == group.rank) continue;
    if (const int64_t missing = wait_for(group, rank, number)) return missing;
  }
  return 0;
}

void add_block(const Group& group, float* x, int64_t from, int64_t n) {
  float total[kBlock];
  for (int64_t rank = 0; rank < group.size; ++rank) {
    const float* part = (rank == group.rank ? x : reinterpret_cast<const float*>(slot(group, rank))) + from;
    if (rank == 0) {
      std::memcpy(total, part, n * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) total[i] += part[i];
    }
  }
  std::memcpy(x + from, total, n * sizeof(float));
}

int64_t sum_piece(Group& group, float* x, int64_t n) {
  float* own = reinterpret_cast<float*>(slot(group, group.rank));
#pragma omp parallel for schedule(static) if (n >= kParallel)
  for (int64_t from = 0; from < n; from += kBlock) {
    std::memcpy(own + from, x + from, std::min(kBlock, n - from) * sizeof(float));
  }
  if (const int64_t missing = meet(group)) return missing;
#pragma omp parallel for schedule(static) if (n >= kParallel)
  for (int64_t from = 0; from < n; from += kBlock) add_block(group, x, from, std::min(kBlock, n - from));
  ++group.pieces;
  return 0;
}

// Bytes `from` to `to` of rows of `width` bytes, to the same rows of a wider table, whose rows are `stride` bytes.
void spread_rows(char* table, int64_t stride, const char* part, int64_t width, int64_t from, int64_t to) {
  for (int64_t at = from; at < to;) {
    const int64_t row = at / width, column = at % width, bytes = std::min(width - column, to - at);
    std::memcpy(table + row * stride + column, part + (at - from), bytes);
    at += bytes;
  }
}

}  // namespace

extern "C" {

// x, n floats, becomes its sum over all ranks. 0, or 1 + the number of a rank that did not join before the deadline;
// the group is of no further use then.
int64_t sum(void* of, float* x, int64_t n) {
  Group& group = *static_cast<Group*>(of);
  const int64_t piece = group.slot_bytes / static_cast<int64_t>(sizeof(float));
  for (int64_t from = 0; from < n; from += piece) {
    if (const int64_t missing = sum_piece(group, x + from, std::min(piece, n - from))) return missing;
  }
  return 0;
}

// Rows of widths[rank] bytes of every rank, `part` being this rank's, side by side in `table`. Returns what `sum` does.
int64_t gather(void* of, const char* part, int64_t rows, const int64_t* widths, char* table) {
  Group& group = *static_cast<Group*>(of);
  int64_t stride = 0, widest = 0;
  for (int64_t rank = 0; rank < group.size; ++rank) {
    stride += widths[rank];
    widest = std::max(widest, widths[rank]);
  }
  for (int64_t from = 0; from < rows * widest; from += group.slot_bytes) {
    const auto end = [&](int64_t rank) { return std::min(from + group.slot_bytes, rows * widths[rank]); };
    if (from < end(group.rank)) std::memcpy(slot(group, group.rank), part + from, end(group.rank) - from);
    if (const int64_t missing = meet(group)) return missing;
    char* columns = table;
    for (int64_t rank = 0; rank < group.size; columns += widths[rank++]) {
      if (from >= end(rank)) continue;
      spread_rows(columns, stride, slot(group, rank), widths[rank], from, end(rank));
    }
    ++group.pieces;
  }
  return 0;
}

// Ends every rank's waits, now and later, for a rank that is known to be lost. From any thread.
void abandon(void* of, int64_t rank) {
  int64_t nobody = 0;
  lost(*static_cast<Group*>(of)).compare_exchange_strong(nobody, 1 + rank);
}

}  // extern "C"
