// Sharing units of work out over threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <utility>
#include <vector>

namespace saccade {

// libgomp's entry point, handed over by Python from the runtime that PyTorch runs on: one pool of threads for both.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Parallel gomp_parallel;

template <class Body>
void team(int threads, Body& body) {
  auto call = [](void* data) { (*static_cast<Body*>(data))(); };
  if (threads <= 1) {
    body();
  } else if (gomp_parallel) {
    gomp_parallel(call, &body, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int i = 1; i < threads; ++i) others.emplace_back(call, &body);
    } catch (...) {  // the system has no more threads or memory: those that started share the work
    }
    body();
    for (auto& other : others) other.join();
  }
}

struct KeptMemory {
  char* place = nullptr;
  int64_t size = 0;
  ~KeptMemory() { std::free(place); }
};

// A thread's scratch, 64-byte aligned. While it is small the thread keeps it for its next call: fresh pages cost a fault each,
// at every call more than some kernels take in all. What is kept is ours while we live, as a unit may share out work itself.
class ThreadMemory {
 public:
  explicit ThreadMemory(int64_t bytes) : place(std::exchange(kept.place, nullptr)), size(std::exchange(kept.size, 0)) {
    if (place && size >= bytes) return;
    std::free(place);
    place = static_cast<char*>(std::aligned_alloc(64, size_t((bytes + 127) / 64 * 64)));
    size = bytes;
  }
  ThreadMemory(const ThreadMemory&) = delete;
  ~ThreadMemory() {
    if (size > MOST_KEPT || kept.place) {
      std::free(place);
    } else {
      kept.place = place;
      kept.size = size;
    }
  }

  char* get() const { return place; }

 private:
  static constexpr int64_t MOST_KEPT = int64_t(1) << 20;
  static inline thread_local KeptMemory kept;
  char* place;
  int64_t size;
};

// Runs body(scratch, failed) on each thread of a team. 0, or 1 if memory ran out.
template <class Body>
int team_with_scratch(int threads, int64_t scratch_bytes, const Body& work) {
  std::atomic<int> failed{0};
  auto body = [&] {
    const ThreadMemory scratch(scratch_bytes);
    if (scratch.get())
      work(scratch.get(), failed);
    else
      failed = 1;
  };
  team(threads, body);
  return failed;
}

// Runs unit(number, scratch) for all numbers, each thread taking the next one when it is done. 0, or 1 if memory ran out.
template <class Unit>
int share_out(int threads, int64_t units, int64_t scratch_bytes, const Unit& unit) {
  std::atomic<int64_t> next{0};
  return team_with_scratch(threads > units ? int(units) : threads, scratch_bytes, [&](char* scratch, std::atomic<int>& failed) {
    for (int64_t number; !failed && (number = next++) < units;) unit(number, scratch);
  });
}

// As share_out; unit(number, following, scratch) also hears which one this thread does next, or -1.
template <class Unit>
int share_out_ahead(int threads, int64_t units, int64_t scratch_bytes, const Unit& unit) {
  std::atomic<int64_t> next{0};
  return team_with_scratch(threads > units ? int(units) : threads, scratch_bytes, [&](char* scratch, std::atomic<int>& failed) {
    for (int64_t number = next++, following; !failed && number < units; number = following) {
      following = next++;
      unit(number, following < units ? following : -1, scratch);
    }
  });
}

}  // namespace saccade
