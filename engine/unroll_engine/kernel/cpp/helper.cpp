#include "helper.hpp"

#include <pthread.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace unroll {

namespace {

// Longer than the engine takes from one tick to the next. To sleep and be woken takes longer than that.
constexpr std::chrono::microseconds spin{50};

// Waits until `state` is no longer `old`.
void await(const std::atomic<int>& state, int old) {
    const auto end = std::chrono::steady_clock::now() + spin;
    while (state.load(std::memory_order_acquire) == old) {
        std::this_thread::yield();  // the other thread may wait for this core
        if (std::chrono::steady_clock::now() > end) return state.wait(old, std::memory_order_acquire);
    }
}

struct Helpers {
    std::mutex lock;
    std::vector<Helper*> idle;
};

// Never destroyed: helpers run until the process exits. A forked child has none of its parent's threads.
Helpers& helpers() {
    static Helpers* const all = new Helpers;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { new (all) Helpers; });
    static_cast<void>(registered);
    return *all;
}

}  // namespace

Helper& Helper::claim() {
    Helpers& all = helpers();
    {
        const std::lock_guard lock(all.lock);
        if (!all.idle.empty()) {
            Helper* const last = all.idle.back();
            all.idle.pop_back();
            return *last;
        }
    }
    auto made = std::make_unique<Helper>();
    std::thread(&Helper::serve, made.get()).detach();
    return *made.release();
}

void Helper::start(std::function<void()> work) {
    work_ = std::move(work);
    state_.store(busy, std::memory_order_release);
    state_.notify_one();
}

void Helper::finish() {
    await(state_, busy);
    Helpers& all = helpers();
    const std::lock_guard lock(all.lock);
    all.idle.push_back(this);
}

void Helper::serve() {
    for (;;) {
        await(state_, idle);
        work_();
        state_.store(idle, std::memory_order_release);
        state_.notify_one();
    }
}

}  // namespace unroll
