// HTTP/2 connections of gRPC callers, without I/O: received bytes in, events and bytes to send out.
//
// A Server has the state shared by all connections; a Session is a connection; a Call is a call on it. All are used on
// one thread. Times are in seconds, on one clock that the caller reads.
#pragma once

#include <nghttp2/nghttp2.h>

#include <array>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>
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
// The ping of a drain.
constexpr uint8_t drain_ping[8] = {'d', 'r', 'a', 'i', 'n', 'i', 'n', 'g'};

struct Method {
    bool streams;   // true if a call has many messages, or is handed over before its message is received
    int work;       // kind of work that an overloaded server refuses unread; -1 for none
    uint64_t refused = 0;
};

// A call. It can outlive its stream; from then on its methods do nothing.
class Call : public std::enable_shared_from_this<Call> {
   public:
    Call(Session* session, int32_t id) : session_(session), id_(id) {}

    // Returns the next message. If there is none yet, a `readable` event follows when there is one, or at the end.
    std::optional<std::string> receive();
    // True if the caller has half-closed and every message was received.
    bool ended() const { return half_closed_ && !inbox_.size(); }

    // Sends headers before the first message, in addition to those of every call.
    void send_headers(const Metadata& metadata);
    // Queues a message. Returns false if the queue is full; a `writable` event follows when it is not.
    bool send(std::string message);
    // Ends the call. Nothing can be sent afterwards.
    void finish(const Status& status);
    // Sends a message and ends the call with OK.
    void respond(std::string message, const Metadata& trailers);

    bool finished() const { return finished_; }
    int code() const { return status_.code; }
    Session* session() const { return session_; }

    const std::string& path() const { return path_ ? *path_ : unknown_path_; }

    int method = no_method;
    Metadata metadata;
    double began = 0;  // time at which its headers were complete
    double deadline = never;
    bool reports_end = false;  // true for a `closed` event when the answer is sent, or can't be sent

   private:
    friend class Session;
    friend class Server;
    friend struct Callbacks;

    void open_response(bool ends, const Status* status);
    static ssize_t read(nghttp2_session*, int32_t id, uint8_t* buffer, size_t room, uint32_t* flags,
                        nghttp2_data_source* source, void*);
    ssize_t fill(uint8_t* buffer, size_t room, uint32_t* flags);
    void wake();
    void fail(const Status& problem);
    void reject(const char* http_status);
    void refuse(const Refusal& refusal);
    void release(size_t size);
    void count();

    Session* session_;  // null once the stream is closed
    const std::string* path_ = nullptr;  // the server's; null if it has no such method
    std::string unknown_path_;
    int32_t id_;
    // Until then it owns itself, and is in the session's list of open calls.
    std::shared_ptr<Call> self_;
    Call* previous_ = nullptr;
    Call* next_ = nullptr;
    MessageReader inbox_;
    size_t unconsumed_ = 0;  // bytes of the stream's window used by messages that were not received yet
    size_t counted_ = 0;     // its part of Server::unfinished_
    size_t header_bytes_ = 0;
    Encoding encoding_ = Encoding::identity;
    Metadata initial_;
    struct Piece {
        std::string message;
        size_t sent;  // bytes sent, including the prefix of 5
    };
    std::list<Piece> out_;  // a deque would allocate even for calls without answers
    size_t out_bytes_ = 0;
    Status status_;
    bool is_post_ = false;
    bool is_grpc_ = false;
    int work_ = -1;  // that of its method, while its message is expected
    bool unary_ = false;
    bool has_te_ = false;
    bool headers_done_ = false;
    bool announced_ = false;  // true once an event has reported it
    bool half_closed_ = false;
    bool waiting_ = false;
    bool blocked_ = false;
    bool responded_ = false;
    bool deferred_ = false;
    bool finished_ = false;
};

enum class Kind : int {
    opened,     // a call of a method that streams, or of an unknown method
    request,    // a call with its only message
    readable,   // a message or the end, for a call that waits for it
    writable,   // the queue has room for messages again
    aborted,    // ended, not by the handler: cancelled by the caller, past its deadline, or with a malformed message
    closed,     // see Call::reports_end
};

struct Event {
    Kind kind;
    std::shared_ptr<Call> call;
    std::string message;
};

struct Limits {
    size_t message = 16 << 20;        // bytes of a request message
    size_t metadata = 16 << 10;       // bytes of the metadata of a call, counted as in HPACK
    size_t unfinished = 512u << 20;   // bytes of incomplete messages, over all connections
    uint32_t calls = 1000;            // concurrent calls on a connection
    double keepalive = 60;            // seconds of silence before a ping
    double patience = 20;             // seconds for a first SETTINGS frame, and for the answer to a ping
    double shortest_pings = 5;        // least seconds between two pings of a client
};

// The calls that an overloaded server refuses before it reads their message: those with too much work due before their
// deadline.
struct Refusal {
    double until = -never;
    double rate = 0;    // work done per second; 0 to refuse every call
    double call = 0;    // work of an accepted call
    std::vector<std::pair<double, double>> due;  // ascending deadlines, and the work due by each
    int code = ok;      // status of the answer
    Metadata wire{};    // headers of the answer beside those of every call
    std::vector<nghttp2_nv> headers{};  // all of them; views of `wire`
};

class Server {
   public:
    explicit Server(const Limits& limits) : limits(limits) {}

    int add_method(const std::string& path, bool streams, int work);
    // Refuses calls of methods with this kind of work.
    void refuse(size_t work, const Status& status, Refusal refusal);
    // Returns the number of refused calls of a method since the last call of this function.
    uint64_t take_refused(int method) { return std::exchange(methods_.at(static_cast<size_t>(method)).refused, 0); }

    std::vector<Event> take_events() {
        ready_ = {};
        return std::exchange(events_, {});
    }
    bool has_events() const { return !events_.empty(); }
    // Returns the sessions that may have bytes to send since the last call of this function.
    std::vector<Session*> take_dirty();
    double next_deadline() const { return deadlines_.empty() ? never : deadlines_.begin()->first; }
    // Ends the calls whose deadline has passed.
    void expire(double now);
    // Checks the connections, and is called regularly. Returns those to close at once.
    std::vector<Session*> tick(double now);

    const Limits limits;

   private:
    friend class Session;
    friend class Call;

    void emit(Kind kind, Call& call, std::string message = {});
    // Sets the path of a call and the number of its method.
    void find_method(Call& call, std::string_view path);
    const Refusal* refusal_of(Call& call, double now);
    // Records that a call's message is complete, or will never be.
    void unexpect(Call& call, bool ready);

    std::map<std::string, int, std::less<>> paths_;
    std::vector<Method> methods_;
    std::array<Refusal, kinds_of_work> refusals_;
    // Numbers of calls by kind of work: accepted since the refusal was set, or not handed over by then; with an
    // incomplete message; ready to be handed over. The refusal's work has those that were handed over.
    std::array<double, kinds_of_work> taken_{}, expected_{}, ready_{};
    std::vector<Event> events_;
    std::set<std::pair<double, Call*>> deadlines_;
    std::unordered_set<Session*> sessions_;
    std::vector<Session*> dirty_;
    size_t unfinished_ = 0;
};

// Returns a status as trailers on the wire.
Metadata wire_of(const Status& status);
// Returns the headers of an answer: those of every call, then views of metadata on the wire.
std::vector<nghttp2_nv> response_headers(const Metadata& wire);
// Returns the state of a connection in nghttp2, with the session's functions as callbacks.
nghttp2_session* new_http2(Session& session);

class Session {
   public:
    // `age` is the age in seconds from which on no new calls are accepted; 0 for no limit.
    Session(std::shared_ptr<Server> server, double now, double age);
    virtual ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // Processes received bytes. Events go to the server. Returns true if a call was refused unread.
    bool receive(const uint8_t* data, size_t size, double now);
    // Returns the next bytes to send, about `most` of them.
    std::string output(size_t most);
    // Tells the client to open no more calls here. Open calls continue.
    void drain();
    // Ends all calls, since the connection is lost.
    void lost();
    // True if the connection should be closed once the output is sent.
    bool over() const;
    size_t calls() const { return open_; }
    // Number of open calls of methods that stream.
    size_t streams() const { return streams_; }

   private:
    friend class Server;
    friend class Call;
    friend struct Callbacks;

    Call* call_of(int32_t id) const {
        if (first_ && first_->id_ == id) return first_;
        return static_cast<Call*>(nghttp2_session_get_stream_user_data(http2_, id));
    }
    void begin(int32_t id);
    int add_header(Call& call, std::string_view name, std::string_view value);
    void end_headers(Call& call);
    Status problem_of(const Call& call) const;
    void add_data(Call& call, const uint8_t* data, size_t size);
    void half_close(Call& call);
    void deliver(Call& call);
    void close(Call& call);
    void refused();
    // Tells the client to send no message before its call is accepted, or that it may again.
    void narrow(bool narrow);
    void widen(const Call& call);
    void widen_accepted();
    void pinged();
    void charge();
    void sent();
    void calm(std::string_view reason);
    void leave();
    void mark();
    bool check(double now);

    std::shared_ptr<Server> server_;
    nghttp2_session* http2_ = nullptr;
    Call* first_ = nullptr;  // the newest of the open calls
    size_t open_ = 0;
    size_t streams_ = 0;
    std::string plain_;  // the answer to a client that does not speak HTTP/2
    double now_;
    double born_;
    double age_;
    double heard_;
    double ping_sent_ = never;
    double drained_ = never;
    double allowance_;  // number of useless frames that are still tolerated
    double allowance_at_;
    double ping_at_ = -never;
    int ping_strikes_ = 0;
    double refused_at_ = -never;
    bool refused_ = false;  // true if a call was refused unread in this `receive`
    bool narrow_ = false;
    bool greeted_ = false;
    bool leaving_ = false;
    bool left_ = false;
    bool broken_ = false;
    bool dirty_ = false;
};

}  // namespace unroll
