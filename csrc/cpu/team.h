// The threads of one call, working through it phase by phase in a single parallel region.
//
// Entering and leaving a region of the caller's pool costs 2-5 us, and on a busy machine each end of one waits for a
// thread that has lost its core: a call takes one region whatever the number of its phases. Its threads all run the
// same program. In every phase each has a share of the tasks, the same one in each call, for what it wrote last time is
// in its cache; whoever is done takes tasks from the shares of others, so that a thread that came late or was
// interrupted holds nobody up. Which thread does a task is a matter of chance: results must depend on the tasks alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#include "fast_embedding.h"

namespace fast_embedding::cpu {

class Team {
 public:
  // A thread's own place in the program.
  class Member {
   public:
    // Runs task(i) for all i in [0, count), each once by one of the members, and returns when all are done. Every
    // member must come here with the same count, which therefore cannot be read from memory that a later phase writes:
    // a member may come when the others have finished the whole program.
    template <typename Task>
    void for_each(int64_t count, const Task& task) {
      if (team_.size_ == 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
      }
      const int64_t quota = (count + team_.size_ - 1) / team_.size_;
      all_done_ += count;
      int64_t done = 0;
      for (int64_t i = 0; i < team_.size_ && !is_over(); ++i) {
        const int64_t member = index_ + i < team_.size_ ? index_ + i : index_ + i - team_.size_;
        done += work_off(team_.taken_[member], member * quota, std::min(quota, count - member * quota), task);
      }
      if (done > 0) team_.done_.fetch_add(done, std::memory_order_release);
      // Only tasks that a running thread has taken are waited for, so this ends even where the pool runs its threads
      // one after another.
      if (!is_over()) wait();
      begin_ += quota;
    }

    // task(begin, end) over [0, count) in ranges of `grain`, the last may be shorter.
    template <typename Task>
    void for_ranges(int64_t count, int64_t grain, const Task& task) {
      for_each((count + grain - 1) / grain, [&](int64_t i) { task(i * grain, std::min((i + 1) * grain, count)); });
    }

    // task() once, by one of the members.
    template <typename Task>
    void once(const Task& task) {
      for_each(1, [&](int64_t) { task(); });
    }

    // The members at most; 1 is exact.
    int64_t team_size() const { return team_.size_; }

   private:
    friend class Team;
    Member(Team& team, int64_t index) : team_(team), index_(index) {}

    // Runs what is left of a share of tasks, [first, first + size); returns how many that were. The counter numbers a
    // share's tasks through all phases, so that nothing need be reset between them.
    template <typename Task>
    int64_t work_off(std::atomic<int64_t>& taken, int64_t first, int64_t size, const Task& task) {
      int64_t done = 0;
      int64_t before = taken.load(std::memory_order_relaxed);
      while (true) {
        const int64_t next = std::max(before, begin_);
        if (next >= begin_ + size) return done;
        if (!taken.compare_exchange_weak(before, next + 1, std::memory_order_relaxed)) continue;
        task(first + next - begin_);
        ++done;
        before = taken.load(std::memory_order_relaxed);
      }
    }

    void wait() const {
      const auto patience_ends = std::chrono::steady_clock::now() + kPatience;
      while (!is_over()) {
        if (std::chrono::steady_clock::now() > patience_ends) std::this_thread::yield();
      }
    }

    bool is_over() const { return team_.done_.load(std::memory_order_acquire) >= all_done_; }

    Team& team_;
    const int64_t index_;
    int64_t begin_ = 0;     // where this phase's numbers begin in each share's counter
    int64_t all_done_ = 0;  // tasks to the end of this phase
  };

  // program(member) on up to `size` threads of the context's pool, the caller's among them.
  template <typename Program>
  static void run(const FeCpuContext& context, int64_t size, const Program& program) {
    Team team(std::clamp<int64_t>(size, 1, std::clamp<int64_t>(context.num_threads, 1, kMaxMembers)));
    auto run_members = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Member member(team, i);
        program(member);
      }
    };
    if (team.size_ == 1) {
      run_members(0, 1);
      return;
    }
    context.parallel_for(
        0, team.size_, 1,
        [](int64_t begin, int64_t end, void* closure) { (*static_cast<decltype(run_members)*>(closure))(begin, end); },
        std::addressof(run_members));
  }

 private:
  explicit Team(int64_t size) : size_(size) {
    done_.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < size; ++i) taken_[i].store(0, std::memory_order_relaxed);
  }

  static constexpr int64_t kMaxMembers = 256;

  // The end of a phase is a task away at most. A core given up on a busy machine is lost for a time slice of some other
  // process, 4-8 ms; waiting forever would keep it from the very thread that is waited for.
  static constexpr std::chrono::microseconds kPatience{500};

  // A line of its own for each counter: its owner writes it for every task.
  struct alignas(64) Counter : std::atomic<int64_t> {
    Counter() = default;
  };

  const int64_t size_;
  Counter done_;
  Counter taken_[kMaxMembers];
};

}  // namespace fast_embedding::cpu
