/* A server that knows the truth: chat completions as event streams, one chunk an event, on schedule.
 *
 *   truth PORT_FILE TOKENS TTFT_MS GAP_MS EVENTS_A_WRITE
 *
 * GAP_MS 0: as fast as the client reads, each stream one write in turn. Listens on loopback on a free port, which it
 * writes to PORT_FILE. GET /log gives, for each answer, "id requested first last" (CLOCK_MONOTONIC, ns): the instant
 * at which its request had been read, and those just before the writes with its first and its last token.
 * One thread, epoll, a heap of deadlines; all that a stream needs is rendered before the clock starts. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

typedef struct { int64_t requested, first, last; } Answer;
typedef struct {
  int fd, next;               /* next: events written so far, -1 between requests */
  size_t got, pending, sent;  /* bytes of the request; of what the socket did not take yet */
  int64_t due;
  long answer;
  char in[65536], *rest;
} Stream;

static int tokens, per_write, epoll;
static int64_t ttft, gap;
static Answer *answers;
static long answered, room;
static Stream **heap, **turns, **spare;
static int heaped, turning, streams;
static const char *WORDS[] = {" the", " café", "\\n", " of", " \\\"so\\\"", " tokens", ",", " 42"};

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void push(Stream *s, int64_t due) {
  s->due = due;
  int i = heaped++;
  for (; i && heap[(i - 1) / 2]->due > due; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
  heap[i] = s;
}
static Stream *pop(void) {
  Stream *top = heap[0], *s = heap[--heaped];
  int i = 0;
  for (int c; (c = 2 * i + 1) < heaped; i = c) {
    if (c + 1 < heaped && heap[c + 1]->due < heap[c]->due) c++;
    if (heap[c]->due >= s->due) break;
    heap[i] = heap[c];
  }
  if (heaped) heap[i] = s;
  return top;
}

static int chunk(char *out, long id, const char *tail) {
  char event[512];
  int n = tail ? snprintf(event, sizeof event, "data: {\"id\":\"truth-%08ld\",\"object\":\"chat.completion.chunk\","
                          "\"created\":1790000000,\"model\":\"truth\",%s}\n\n", id, tail)
               : snprintf(event, sizeof event, "data: [DONE]\n\n");
  return sprintf(out, "%x\r\n%s\r\n", n, event);
}

static void leave(Stream *s) { /* (never while it stands in the heap: that is where only writing streams are) */
  close(s->fd);
  free(s->rest);
  s->fd = -1;
  s->rest = NULL;
}

static int send_all(Stream *s, const char *data, size_t n) {
  ssize_t done = write(s->fd, data, n);
  if (done < 0 && errno != EAGAIN) return -1;
  if (done < 0) done = 0;
  if ((size_t)done < n) { /* the client does not keep up: go on when it reads */
    s->rest = malloc(n - done);
    memcpy(s->rest, data + done, s->pending = n - done);
    s->sent = 0;
    struct epoll_event e = {EPOLLIN | EPOLLOUT, {.ptr = s}};
    epoll_ctl(epoll, EPOLL_CTL_MOD, s->fd, &e);
  }
  return 0;
}

/* The next write of a stream; 1 while there is more to come, 0 at the end, -1 when the client is gone. */
static int step(Stream *s) {
  static char out[1 << 16];
  char tail[256];
  int n = 0, end = s->next + per_write < tokens ? s->next + per_write : tokens;
  Answer *a = &answers[s->answer];
  if (s->next == 0) {
    n = sprintf(out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Request-Id: truth-%08ld\r\n"
                "Transfer-Encoding: chunked\r\n\r\n", s->answer);
    n += chunk(out + n, s->answer, "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]");
  }
  for (int i = s->next; i < end; i++) {
    sprintf(tail, "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"%s\"},\"finish_reason\":null}]", WORDS[(i + s->answer) % 8]);
    n += chunk(out + n, s->answer, tail);
  }
  int64_t t = now();
  if (s->next == 0) a->first = t;
  a->last = t;
  s->next = end;
  if (end == tokens) {
    n += chunk(out + n, s->answer, "\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]");
    sprintf(tail, "\"choices\":[],\"usage\":{\"prompt_tokens\":40,\"completion_tokens\":%d,\"total_tokens\":%d}", tokens, tokens + 40);
    n += chunk(out + n, s->answer, tail);
    n += chunk(out + n, s->answer, NULL);
    n += sprintf(out + n, "0\r\n\r\n");
    s->next = -1;
  }
  if (send_all(s, out, n) < 0) return -1;
  return end < tokens;
}

static void schedule(Stream *s) {
  if (gap) push(s, s->due + gap * per_write);
  else turns[turning++] = s;
}

static void go_on(Stream *s) { /* one write, and the next one planned unless the socket is full */
  int more = step(s);
  if (more < 0) leave(s);
  else if (more && !s->pending) schedule(s);
}

static void give_log(Stream *s) {
  size_t n = 0;
  char *body = malloc(answered * 100 + 1), head[128];
  for (long i = 0; i < answered; i++)
    n += sprintf(body + n, "truth-%08ld %ld %ld %ld\n", i, (long)answers[i].requested, (long)answers[i].first, (long)answers[i].last);
  int h = sprintf(head, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n", n);
  fcntl(s->fd, F_SETFL, 0);
  if (write(s->fd, head, h) == h)
    for (size_t done = 0; done < n;) {
      ssize_t k = write(s->fd, body + done, n - done);
      if (k <= 0) break;
      done += k;
    }
  free(body);
  shutdown(s->fd, SHUT_WR);
}

static void take(Stream *s) {
  ssize_t n = read(s->fd, s->in + s->got, sizeof s->in - 1 - s->got);
  if (n <= 0) {
    if (n == 0 || errno != EAGAIN) {
      if (s->next < 0 || s->pending) leave(s);
      else s->next = tokens; /* gone in mid-answer: the next write finds out */
    }
    return;
  }
  s->got += n;
  s->in[s->got] = 0;
  char *end = strstr(s->in, "\r\n\r\n"), *length = strcasestr(s->in, "\r\ncontent-length:");
  size_t whole = end ? end + 4 - s->in + (length && length < end ? atoi(length + 17) : 0) : 0;
  if (!end || s->got < whole) return;
  int asks = !memcmp(s->in, "GET ", 4);
  memmove(s->in, s->in + whole, s->got -= whole);
  if (asks) {
    give_log(s);
    return;
  }
  if (answered == room) answers = realloc(answers, (room = room ? 2 * room : 65536) * sizeof *answers);
  s->answer = answered++;
  s->due = (answers[s->answer].requested = now()) + ttft;
  s->next = 0;
  if (ttft) push(s, s->due);
  else go_on(s);
}

int main(int argc, char **argv) {
  if (argc != 6) return 2;
  tokens = atoi(argv[2]), ttft = atof(argv[3]) * 1e6, gap = atof(argv[4]) * 1e6, per_write = atoi(argv[5]);
  signal(SIGPIPE, SIG_IGN);
  struct rlimit files = {65536, 65536};
  setrlimit(RLIMIT_NOFILE, &files);
  struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof here;
  int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (bind(listener, (void *)&here, size) || listen(listener, 8192) || getsockname(listener, (void *)&here, &size)) return 1;
  FILE *said = fopen(argv[1], "w");
  fprintf(said, "%d\n", ntohs(here.sin_port));
  fclose(said);
  epoll = epoll_create1(0);
  struct epoll_event e = {EPOLLIN, {.ptr = NULL}}, events[512];
  epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &e);
  heap = malloc(65536 * sizeof *heap), turns = malloc(65536 * sizeof *turns), spare = malloc(65536 * sizeof *spare);
  for (;;) {
    int64_t wait = turning ? 0 : heaped ? heap[0]->due - now() : -1;
    /* the last fraction of a millisecond is spun: epoll's clock is too coarse for the truth */
    int n = epoll_wait(epoll, events, 512, wait < 0 ? (heaped || turning ? 0 : -1) : (int)(wait / 1000000));
    for (int i = 0; i < n; i++) {
      Stream *s = events[i].data.ptr;
      if (!s) {
        for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0 && streams < 65536; streams++) {
          setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
          s = calloc(1, sizeof *s);
          s->fd = fd, s->next = -1;
          e = (struct epoll_event){EPOLLIN, {.ptr = s}};
          epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
        }
        continue;
      }
      if (events[i].events & EPOLLOUT && s->pending) {
        ssize_t k = write(s->fd, s->rest + s->sent, s->pending - s->sent);
        if (k > 0 && (s->sent += k) == s->pending) {
          free(s->rest);
          s->rest = NULL, s->pending = 0;
          e = (struct epoll_event){EPOLLIN, {.ptr = s}};
          epoll_ctl(epoll, EPOLL_CTL_MOD, s->fd, &e);
          if (s->next >= 0) schedule(s);
        }
      }
      if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && s->fd >= 0) take(s);
    }
    while (heaped && heap[0]->due <= now()) go_on(pop());
    Stream **round = turns; /* each one write; those that go on stand in the next round */
    int many = turning;
    turns = spare, spare = round, turning = 0;
    for (int i = 0; i < many; i++) go_on(round[i]);
  }
}
