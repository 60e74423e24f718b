// A client that sends arbitrary bytes, for libFuzzer: `make fuzz`. The first byte of an input selects what is sent
// before it, how it is split, and what the handlers do.
#include <cstdlib>

#include "session.hpp"

using namespace unroll;

namespace {

constexpr std::string_view greeting("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 33);
// Opens call 1 of a method: POST, http, a literal path, te and content-type.
constexpr std::string_view opening[] = {
    std::string_view("\0\0\x32\1\4\0\0\0\1\x83\x86\4\2/u\x40\2te\x8trailers\x40\xc"
                     "content-type\x10"
                     "application/grpc",
                     59),
    std::string_view("\0\0\x32\1\4\0\0\0\1\x83\x86\4\2/s\x40\2te\x8trailers\x40\xc"
                     "content-type\x10"
                     "application/grpc",
                     59),
};

void feed(Session& session, std::string_view data, double now) {
    session.receive(reinterpret_cast<const uint8_t*>(data.data()), data.size(), now);
}

void answer(Call& call, bool slowly) {
    while (auto message = call.receive()) {
        if (!call.send(std::move(*message)) && slowly) return;
    }
    if (call.ended()) call.finish({ok, {}, {{"x-bin", "x"}}});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (!size) return 0;
    const uint8_t mode = data[0];
    std::string_view input(reinterpret_cast<const char*>(data + 1), size - 1);
    Limits limits;
    limits.message = 1 << 16;
    limits.unfinished = 1 << 17;
    auto server = std::make_shared<Server>(limits);
    server->add_method("/u", false, 0);
    server->add_method("/s", true, -1);
    // Every call, or those with near deadlines; until some pieces later.
    const double rate = mode & 16 ? 1 : 0;
    if (mode & 1) server->refuse(0, {resource_exhausted, "full", {}}, {2, rate, 1, {{0.5, 1}}, ok, {}});
    double now = 0;
    Session session(server, now, mode & 2 ? 3 : 0);
    if (mode & 4) feed(session, greeting, now);
    if (mode & 8) feed(session, opening[mode >> 4 & 1], now);
    const size_t piece = mode & 32 ? 7 : 1000;
    while (true) {
        for (const Event& event : server->take_events()) {
            if (event.kind == Kind::request && mode & 64) event.call->reports_end = true;
            if (event.kind == Kind::request) event.call->respond(event.message, {});
            if (event.kind != Kind::request && event.kind != Kind::closed) answer(*event.call, mode & 64);
        }
        if (mode & 128) session.output(100);
        if (input.empty()) break;
        const size_t next = std::min(piece, input.size());
        feed(session, input.substr(0, next), now += 0.5);
        input.remove_prefix(next);
        server->tick(now);
        server->expire(now);
    }
    session.output(1 << 20);
    session.lost();
    server->take_events();
    // No call and no deadline may be left.
    if (session.calls() || server->next_deadline() != never) std::abort();
    return 0;
}
