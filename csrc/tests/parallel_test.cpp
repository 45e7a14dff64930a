// parallel_for: every task once, thread numbers in range, exceptions arrive, concurrent callers do not mix.
#include <atomic>
#include <stdexcept>
#include <thread>

#include "common/parallel.h"
#include "check.h"

using namespace tdc_test;

namespace {

void runs_each_task_once(int64_t tasks, int threads) {
  std::vector<int> count(tasks, 0);  // plain ints: a task that ran twice at once is a data race
  std::atomic<bool> in_range{true};
  tdc::parallel_for(tasks, threads, [&](int64_t task, int thread) {
    ++count[task];
    if (thread < 0 || thread >= threads) in_range = false;
  });
  CHECK(in_range);
  for (int times : count) CHECK(times == 1);
}

void passes_on_an_exception(int threads) {
  bool caught = false;
  try {
    tdc::parallel_for(100, threads, [](int64_t task, int) {
      if (task == 37) throw std::runtime_error("task 37");
    });
  } catch (const std::runtime_error& error) {
    caught = std::string(error.what()) == "task 37";
  }
  CHECK(caught);
}

void serves_concurrent_callers() {
  std::vector<int64_t> sums(3, 0);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&sums, caller] {
      for (int round = 0; round < 50; ++round) {
        std::vector<int64_t> parts(20, 0);
        tdc::parallel_for(20, 3, [&](int64_t task, int) { parts[task] = task; });
        for (int64_t part : parts) sums[caller] += part;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int64_t sum : sums) CHECK(sum == 50 * 190);
}

}  // namespace

int main() {
  if (!isa_available()) return kSkipped;
  std::printf("parallel backend: %s\n", tdc::parallel_backend());
  for (int threads : {1, 2, 3, 8}) {
    for (int64_t tasks : {0, 1, 2, 7, 1000}) runs_each_task_once(tasks, threads);
    passes_on_an_exception(threads);
  }
  serves_concurrent_callers();
  return report("parallel_test");
}
