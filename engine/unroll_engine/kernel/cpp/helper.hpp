// Threads that stay, since waking one takes a tenth of the time of starting one.
#pragma once

#include <atomic>
#include <functional>

namespace unroll {

// A thread that runs one function at a time.
class Helper {
public:
    // Returns a helper that nobody else uses until `finish`. Throws std::system_error if no thread can be started.
    static Helper& claim();
    // Wakes the helper to run a function, which must not throw.
    void start(std::function<void()> work);
    // Waits until the function has returned, and gives the helper back.
    void finish();

private:
    enum State : int { idle, busy };

    void serve();

    std::atomic<int> state_{idle};
    std::function<void()> work_;
};

}  // namespace unroll
