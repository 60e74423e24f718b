// The state shared by all connections: methods, events, deadlines, refusals.
#include "session.hpp"

#include <algorithm>

namespace unroll {

int Server::add_method(const std::string& path, bool streams, int work) {
    methods_.push_back({streams, work});
    return paths_[path] = static_cast<int>(methods_.size()) - 1;
}

void Server::find_method(Call& call, std::string_view path) {
    const auto found = paths_.find(path);
    if (found == paths_.end()) {
        call.unknown_path_ = path;
    } else {
        call.path_ = &found->first;
        call.method = found->second;
    }
}

std::vector<Session*> Server::take_dirty() {
    for (Session* session : dirty_) session->dirty_ = false;
    return std::exchange(dirty_, {});
}

void Server::expire(double now) {
    while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
        const auto call = deadlines_.begin()->second->shared_from_this();
        call->fail({deadline_exceeded, "Deadline Exceeded", {}});
    }
}

std::vector<Session*> Server::tick(double now) {
    std::vector<Session*> dead;
    for (Session* session : sessions_)
        if (!session->check(now)) dead.push_back(session);
    return dead;
}

void Server::emit(Kind kind, Call& call, std::string message) {
    events_.push_back({kind, call.shared_from_this(), std::move(message)});
}

void Server::refuse(size_t work, const Status& status, Refusal refusal) {
    refusal.code = status.code;
    refusal.wire = wire_of(status);
    Refusal& kept = refusals_.at(work) = std::move(refusal);
    kept.headers = response_headers(kept.wire);
    taken_[work] = expected_[work] + ready_[work];
}

const Refusal* Server::refusal_of(Call& call, double now) {
    if (call.method == no_method) return nullptr;
    const int work = methods_[static_cast<size_t>(call.method)].work;
    if (work < 0) return nullptr;
    const auto kind = static_cast<size_t>(work);
    const Refusal& refusal = refusals_[kind];
    if (now < refusal.until) {
        if (!refusal.rate) return &refusal;
        double before = taken_[kind] * refusal.call;
        const auto due = std::upper_bound(refusal.due.begin(), refusal.due.end(), std::pair{call.deadline, never});
        if (due != refusal.due.begin()) before += std::prev(due)->second;
        if (before && before + 1 > refusal.rate * (call.deadline - now)) return &refusal;
    }
    taken_[kind]++;
    expected_[kind]++;
    call.work_ = work;
    return nullptr;
}

void Server::unexpect(Call& call, bool ready) {
    if (call.work_ < 0) return;
    const auto kind = static_cast<size_t>(std::exchange(call.work_, -1));
    expected_[kind]--;
    if (ready) ready_[kind]++;
}

}  // namespace unroll
