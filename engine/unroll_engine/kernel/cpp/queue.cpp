// The queue of sequences that wait for slots, and the threads that run them.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <system_error>

#include "helper.hpp"
#include "network.hpp"

namespace unroll {

namespace {

int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace

// Takes the lock only for a waiting job: sequences of one length end on all threads at once.
class alignas(64) Queue::Turn final : public Source {
public:
    Turn(Queue& queue, const std::unordered_set<int64_t>& cancelled, int64_t now)
        : queue_(queue), cancelled_(cancelled), now_(now) {}

    bool next(Job& job) override {
        const std::lock_guard lock(queue_.lock_);
        while (!queue_.waiting_.empty()) {
            job = queue_.waiting_.front();
            queue_.waiting_.pop_front();
            const auto outcome = stopped(job);
            if (!outcome) return true;
            ended(job, *outcome);
        }
        return false;
    }

    std::optional<Outcome> stopped(const Job& job) override {
        if (!cancelled_.empty() && cancelled_.count(job.ticket)) return Outcome::cancelled;
        if (job.deadline && job.deadline <= now_) return Outcome::expired;
        return std::nullopt;
    }

    void ended(const Job& job, Outcome outcome) override { all_ended.push_back({job.ticket, outcome, false}); }

    std::vector<Ended> all_ended;

private:
    Queue& queue_;
    const std::unordered_set<int64_t>& cancelled_;
    const int64_t now_;
};

Queue::Queue(std::shared_ptr<const Network> network, int64_t slots, int64_t threads, int64_t worthwhile)
    : network(std::move(network)), worthwhile_(worthwhile) {
    for (int64_t thread = 0; thread < threads; thread++)
        slots_.push_back(std::make_unique<Slots>(*this->network, slots));
}

int64_t Queue::submit(std::vector<Job>& jobs) {
    const std::lock_guard lock(lock_);
    const int64_t ticket = ++tickets_;
    live_[ticket] = jobs.size();
    size_ += jobs.size();
    for (Job& job : jobs) {
        job.ticket = ticket;
        waiting_.push_back(job);
    }
    return ticket;
}

bool Queue::cancel(int64_t ticket) {
    const std::lock_guard lock(lock_);
    if (!live_.count(ticket)) return false;
    cancelled_.insert(ticket);
    return true;
}

int64_t Queue::advance(int64_t budget, int64_t rounds, std::vector<Ended>& ended) {
    if (running_.test_and_set()) throw std::logic_error("advance: the last call has not returned");
    const struct Ending {
        std::atomic_flag& flag;
        ~Ending() { flag.clear(); }
    } ending{running_};
    std::unordered_set<int64_t> cancelled;
    {
        const std::lock_guard lock(lock_);
        cancelled = cancelled_;
    }
    const int64_t count = threads(), most = (size() + count - 1) / count, begin = now();
    int64_t total = 0;
    std::vector<int64_t> ran(count);
    std::deque<Turn> turns;
    // Assigned before any thread runs, so that no race decides how many steps a sequence gets.
    for (int64_t thread = 0; thread < count; thread++) {
        slots_[thread]->fill(turns.emplace_back(*this, cancelled, begin), most);
        total += slots_[thread]->active();
    }
    std::vector<Helper*> others;
    for (int64_t thread = count; thread-- > 0;) {
        const int64_t active = slots_[thread]->active();
        const int64_t own = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(budget) * active / std::max<int64_t>(1, total)));
        const auto run = [=, this, &ran, &turns] { ran[thread] = slots_[thread]->run(turns[thread], own, rounds, most); };
        const double steps = std::min<double>(own, static_cast<double>(rounds) * active);
        try {
            if (thread && steps * network->products() >= worthwhile_) {
                others.push_back(&Helper::claim());
                others.back()->start(run);
                continue;
            }
        } catch (const std::system_error&) {  // no more threads are available
        }
        run();
    }
    for (Helper* other : others) other->finish();
    const std::lock_guard lock(lock_);
    for (const Turn& turn : turns) {
        for (Ended each : turn.all_ended) {
            const auto live = live_.find(each.ticket);
            each.last = --live->second == 0;
            if (each.last) {
                live_.erase(live);
                cancelled_.erase(each.ticket);
            }
            ended.push_back(each);
        }
        size_ -= turn.all_ended.size();
    }
    return std::accumulate(ran.begin(), ran.end(), int64_t{0});
}

int64_t Queue::size() const {
    const std::lock_guard lock(lock_);
    return size_;
}

}  // namespace unroll
