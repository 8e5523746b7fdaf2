"""Prepared launches on a CPU, one after the other and on several threads, with no Python in between.

A kernel of Warp's on a CPU is a function of two addresses, those of its launch bounds and of its arguments. A
program is a list of such calls, and of integers that are stored into bounds and arguments between them. Its
instructions have three words each:

    0, address, value            stores `value`, 4 bytes, at `address`
    kernel, bounds, arguments    calls the kernel

A job is programs that threads take, each the next one, until none is left. Its words are

    0  programs taken; 0 before the job runs
    1  programs
    2  address of clock_gettime
    3  identifier of the monotonic clock
    4  identifier of the clock of a thread's CPU time
    5  CPU time of all threads, added up [ns]
    6  address of a function that returns the number of the calling thread in its team; 0 for none
    7  the first program: address, instructions, and address of its times, three words a call (thread, begin
       and end [ns of the monotonic clock]); 0 where they are not wanted

Threads come from the OpenMP runtime that torch uses: `team` is the address of its GOMP_parallel.
"""

import warp as wp

TAKEN, CPU_TIME = 0, 5
"""Words of a job that are set back to 0 before it runs."""
HEADER = 7
"""Words of a job before its first program."""
PROGRAM = 3
"""Words of a program in a job."""
INSTRUCTION = 3
"""Words of an instruction."""
TIMES = 3
"""Words of the times of a call."""

# `int(` is a macro of Warp's, hence `whole`
_TAKE = f"""
  typedef long long word;
  typedef int whole;
  const auto take = +[](void* data) {{
    word* const job = (word*)data;
    const auto now = (whole (*)(whole, word*))job[2];
    const auto nanoseconds = [now](word clock) {{
      word t[2];
      now((whole)clock, t);
      return t[0] * 1000000000 + t[1];
    }};
    const word begin = nanoseconds(job[4]);
    const word thread = job[6] ? ((whole (*)())job[6])() : 0;
    for (word i; (i = __atomic_fetch_add(job, 1, __ATOMIC_RELAXED)) < job[1];) {{
      const word* const program = job + {HEADER} + {PROGRAM} * i;
      const word* at = (const word*)program[0];
      word* times = (word*)program[2];
      for (const word* const last = at + {INSTRUCTION} * program[1]; at < last; at += {INSTRUCTION}) {{
        if (at[0] == 0) {{
          *(whole*)at[1] = (whole)at[2];
        }} else {{
          if (times) times[0] = thread, times[1] = nanoseconds(job[3]);
          ((void (*)(void*, void*))at[0])((void*)at[1], (void*)at[2]);
          if (times) times[2] = nanoseconds(job[3]), times += {TIMES};
        }}
      }}
    }}
    __atomic_fetch_add(job + 5, nanoseconds(job[4]) - begin, __ATOMIC_RELAXED);
  }};
  if (threads > 1)
    ((void (*)(void (*)(void*), void*, unsigned, unsigned))team)(take, (void*)job, threads, 0);
  else
    take((void*)job);
"""


@wp.func_native("#if !defined(__CUDA_ARCH__)\n" + _TAKE + "#endif\n")
def native_run(job: wp.int64, team: wp.int64, threads: int): ...


@wp.kernel(module="unique", enable_backward=False)
def run_programs(
    job: wp.int64,  # address of the job
    team: wp.int64,  # address of GOMP_parallel; not read with one thread
    threads: int,
):
    native_run(job, team, threads)
