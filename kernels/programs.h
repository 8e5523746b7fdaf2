//: run
  // `int(` is a macro of Warp's, hence `whole`; the structures are those of programs.py
  typedef int whole;
  typedef long long word;
  struct Store { whole* at; word value; };
  struct Call {
    void (*kernel)(void*, void*);
    void *bounds, *arguments;
    Store* stores;
    word count, thread, begin, end;
  };
  struct Program { Call* calls; word count; };
  struct Job {
    Program* programs;
    word count, taken, cpu_time;
    whole (*read_clock)(whole, word*);
    whole (*number)();
    word monotonic, cpu;
  };
  const auto take = +[](void* data) {
    Job& job = *(Job*)data;
    const auto now = [&job](word clock) {
      word t[2];
      job.read_clock((whole)clock, t);
      return t[0] * 1000000000 + t[1];
    };
    const word begin = now(job.cpu), thread = job.number ? job.number() : 0;
    for (word i; (i = __atomic_fetch_add(&job.taken, 1, __ATOMIC_RELAXED)) < job.count;) {
      const Program& program = job.programs[i];
      for (Call* call = program.calls; call < program.calls + program.count; ++call) {
        for (word s = 0; s < call->count; ++s) *call->stores[s].at = (whole)call->stores[s].value;
        call->thread = thread;
        call->begin = now(job.monotonic);
        call->kernel(call->bounds, call->arguments);
        call->end = now(job.monotonic);
      }
    }
    __atomic_fetch_add(&job.cpu_time, now(job.cpu) - begin, __ATOMIC_RELAXED);
  };
  if (threads > 1)
    ((void (*)(void (*)(void*), void*, unsigned, unsigned))team)(take, (void*)job, threads, 0);
  else
    take((void*)job);
