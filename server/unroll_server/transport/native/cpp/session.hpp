// HTTP/2 connections of gRPC callers, without input or output: bytes in, events and bytes out.
//
// A Server holds what all connections share, a Session is one connection, a Call one call on it. Everything is used on
// one thread. Times are seconds on one clock, which the caller reads.
#pragma once

#include <nghttp2/nghttp2.h>

#include <array>
#include <limits>
#include <list>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "grpc.hpp"

namespace unroll {

class Session;
class Server;
struct Refusal;

constexpr double never = std::numeric_limits<double>::infinity();
constexpr int no_method = -1;
constexpr size_t kinds_of_work = 2;

struct Method {
    bool streams;   // takes many messages, or is handed over before its message has come
    int work;       // kind of work that a strained server refuses unread; -1 for none
    uint64_t refused = 0;
};

// One call. It outlives its stream for as long as somebody holds it; then it does nothing any more.
class Call : public std::enable_shared_from_this<Call> {
   public:
    Call(Session* session, int32_t id) : session_(session), id_(id) {}

    // Takes the next message. If there is none yet, a `readable` event follows once there is one, or the end.
    std::optional<std::string> receive();
    // True if the caller has half-closed and every message was taken.
    bool ended() const { return half_closed_ && !inbox_.size(); }

    // Sends headers before the first message, beside those of every call.
    void send_headers(const Metadata& metadata);
    // Queues a message; returns false if enough is queued, so that a `writable` event follows.
    bool send(std::string message);
    // Ends the call. Nothing can be sent afterwards.
    void finish(const Status& status);
    // Sends a message and ends the call with OK.
    void respond(std::string message, const Metadata& trailers);

    bool finished() const { return finished_; }
    int code() const { return status_.code; }
    Session* session() const { return session_; }

    std::string path;
    int method = no_method;
    Metadata metadata;
    double began = 0;  // when its headers had come
    double deadline = never;
    bool reports_end = false;  // whether a `closed` event follows once the answer has left, or can't any more

   private:
    friend class Session;
    friend class Server;
    friend struct Callbacks;

    void open_response(bool ends, const Status* status);
    ssize_t fill(uint8_t* buffer, size_t room, uint32_t* flags);
    void wake();
    void fail(const Status& problem);
    void refuse(const Refusal& refusal);
    void release(size_t size);
    void count();

    Session* session_;  // null once the stream is closed
    int32_t id_;
    MessageReader inbox_;
    size_t unconsumed_ = 0;  // bytes of the stream's window that are used by what was not taken
    size_t counted_ = 0;     // of the server's bytes of messages that have not come whole
    size_t header_bytes_ = 0;
    Encoding encoding_ = Encoding::identity;
    Metadata initial_;
    struct Piece {
        std::string message;
        size_t sent;  // bytes that have left, the prefix of 5 included
    };
    std::list<Piece> out_;  // a deque would allocate for calls without answers, too
    size_t out_bytes_ = 0;
    Status status_;
    bool is_post_ = false;
    bool is_grpc_ = false;
    int work_ = -1;  // of its method, while its message is expected
    bool unary_ = false;
    bool has_te_ = false;
    bool headers_done_ = false;
    bool announced_ = false;  // whether an event has told of it
    bool half_closed_ = false;
    bool waiting_ = false;
    bool blocked_ = false;
    bool responded_ = false;
    bool deferred_ = false;
    bool finished_ = false;
};

enum class Kind : int {
    opened,     // a call of a method that streams, or of none that is known
    request,    // a call with its one message
    readable,   // a message, or the end, for a call that waits
    writable,   // room for messages again
    aborted,    // finished, but not by the handler: the caller left, the deadline passed, or a message was broken
    closed,     // see Call::reports_end
};

struct Event {
    Kind kind;
    std::shared_ptr<Call> call;
    std::string message;
};

struct Limits {
    size_t message = 16 << 20;        // bytes of a request message
    size_t metadata = 16 << 10;       // bytes of the metadata of a call, as HPACK counts
    size_t unfinished = 512u << 20;   // bytes of messages that have not come whole, over all connections
    uint32_t calls = 1000;            // calls at once on a connection
    double keepalive = 60;            // seconds of silence until the other side is pinged
    double patience = 20;             // seconds for a first SETTINGS frame, and for the answer to a ping
    double shortest_pings = 5;        // seconds between two pings of a client
};

// What a strained server refuses before it reads the message: a call before whose deadline too much is to be done.
struct Refusal {
    double until = -never;
    double rate = 0;    // work that may be done in a second until the deadline; 0: every call is refused
    double call = 0;    // work of a call that is taken
    std::vector<std::pair<double, double>> due;  // deadlines, ascending, and the work to be done by each
    int code = ok;      // of the answer
    Metadata wire{};    // and its headers
};

class Server {
   public:
    explicit Server(const Limits& limits) : limits(limits) {}

    int add_method(const std::string& path, bool streams, int work);
    // Refuses calls of methods with this kind of work.
    void refuse(size_t work, const Status& status, Refusal refusal);
    // The calls of a method that were refused since the last call of this.
    uint64_t take_refused(int method) { return std::exchange(methods_.at(static_cast<size_t>(method)).refused, 0); }

    std::vector<Event> take_events() {
        handed_ = std::exchange(ready_, {});
        return std::exchange(events_, {});
    }
    bool has_events() const { return !events_.empty(); }
    // The sessions that may have bytes to send since the last call of this.
    std::vector<Session*> take_dirty();
    double next_deadline() const { return deadlines_.empty() ? never : deadlines_.begin()->first; }
    // Ends the calls whose deadline has passed.
    void expire(double now);
    // Looks after connections, every now and then; returns those that are to be closed at once.
    std::vector<Session*> tick(double now);

    const Limits limits;

   private:
    friend class Session;
    friend class Call;

    void emit(Kind kind, Call& call, std::string message = {});
    const Refusal* refusal_of(Call& call, double now);
    // Records that a call's message has come whole, or won't any more.
    void unexpect(Call& call, bool ready);

    std::unordered_map<std::string, int> paths_;
    std::vector<Method> methods_;
    std::array<Refusal, kinds_of_work> refusals_;
    // Calls by kind of work: taken since the refusal was set or not handed over by then; whose message has not come
    // whole; handed over, and with the last events.
    std::array<double, kinds_of_work> taken_{}, expected_{}, ready_{}, handed_{};
    std::vector<Event> events_;
    std::set<std::pair<double, Call*>> deadlines_;
    std::unordered_set<Session*> sessions_;
    std::vector<Session*> dirty_;
    size_t unfinished_ = 0;
};

class Session {
   public:
    // Seconds of age after which no new calls are taken; 0: any age.
    Session(std::shared_ptr<Server> server, double now, double age);
    virtual ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // Takes what has come; events are the server's.
    void receive(const uint8_t* data, size_t size, double now);
    // What is to be sent, some `most` bytes.
    std::string output(size_t most);
    // Tells the client to open no more calls here; those that are open go on.
    void drain();
    // The connection is gone, with all of its calls.
    void lost();
    // True if the connection is to be closed once the output is sent.
    bool over() const;
    size_t calls() const { return calls_.size(); }

   private:
    friend class Server;
    friend class Call;
    friend struct Callbacks;

    Call* call_of(int32_t id) const {
        return static_cast<Call*>(nghttp2_session_get_stream_user_data(http2_, id));
    }
    void begin(int32_t id);
    int add_header(Call& call, std::string_view name, std::string_view value);
    void end_headers(Call& call);
    Status problem_of(const Call& call) const;
    void reject(Call& call, const char* http_status);
    void add_data(Call& call, const uint8_t* data, size_t size);
    void half_close(Call& call);
    void deliver(Call& call);
    void close(Call& call);
    void pinged();
    void charge();
    void sent();
    void calm(std::string_view reason);
    void leave();
    void mark();
    bool check(double now);

    std::shared_ptr<Server> server_;
    nghttp2_session* http2_ = nullptr;
    std::unordered_map<int32_t, std::shared_ptr<Call>> calls_;
    std::string plain_;  // the answer to what is not HTTP/2
    double now_;
    double born_;
    double age_;
    double heard_;
    double ping_sent_ = never;
    double drained_ = never;
    double allowance_;  // of frames that bring nothing
    double allowance_at_;
    double ping_at_ = -never;
    int ping_strikes_ = 0;
    bool greeted_ = false;
    bool leaving_ = false;
    bool left_ = false;
    bool broken_ = false;
    bool dirty_ = false;
};

}  // namespace unroll
