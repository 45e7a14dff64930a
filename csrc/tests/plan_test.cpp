// The routing plan: a stable counting sort that refuses ids out of range without writing anything.
#include <algorithm>
#include <numeric>

#include "cpu/plan.h"
#include "check.h"

using namespace tdc_test;

namespace {

struct Plan {
  explicit Plan(int64_t batch, int64_t num_groups)
      : order(batch, -7), inverse(batch, -7), offsets(num_groups + 1, -7) {}
  std::vector<int64_t> order, inverse;
  std::vector<int32_t> offsets;

  int64_t build(const std::vector<int64_t>& groups) {
    return tdc::routing_plan(groups.data(), order.data(), inverse.data(), offsets.data(),
                             static_cast<int64_t>(groups.size()), static_cast<int64_t>(offsets.size()) - 1);
  }
};

void sorts_stably(int64_t batch, int64_t num_groups, Random& random) {
  std::vector<int64_t> groups(batch);
  for (int64_t& group : groups) group = random.below(num_groups);
  Plan plan(batch, num_groups);
  CHECK(plan.build(groups) == -1);
  CHECK(plan.offsets.front() == 0 && plan.offsets.back() == batch);
  std::vector<int64_t> expected(batch);
  std::iota(expected.begin(), expected.end(), 0);
  std::stable_sort(expected.begin(), expected.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });
  CHECK(plan.order == expected);
  for (int64_t g = 0; g < num_groups; ++g) {
    for (int64_t i = plan.offsets[g]; i < plan.offsets[g + 1]; ++i) CHECK(groups[plan.order[i]] == g);
  }
  for (int64_t i = 0; i < batch; ++i) CHECK(plan.inverse[plan.order[i]] == i);
}

void refuses(const std::vector<int64_t>& groups, int64_t bad) {
  const Plan untouched(static_cast<int64_t>(groups.size()), 3);
  Plan plan = untouched;
  CHECK(plan.build(groups) == bad);
  CHECK(plan.order == untouched.order && plan.inverse == untouched.inverse && plan.offsets == untouched.offsets);
}

}  // namespace

int main() {
  if (!isa_available()) return kSkipped;
  Random random(1);
  for (int64_t batch : {0, 1, 2, 7, 64, 1000}) {
    for (int64_t num_groups : {1, 2, 8, 100}) sorts_stably(batch, num_groups, random);
  }
  refuses({0, 1, 3, -1}, 2);
  refuses({-1}, 0);
  refuses({2, 2, int64_t{1} << 40}, 2);
  return report("plan_test");
}
