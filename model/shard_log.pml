/* The shard log of burst_dask as a model that spin searches completely.
 *
 * Workers run the tasks of one shard, or of a shard and the child that is split off it, through
 * nothing but entries that are created if absent. Each `::` of a process is one step; anything
 * may happen between two steps of a worker, so a pause of any length, or a request that lands
 * late, needs no further modelling. model/README.md ties each step to the function of
 * burst_dask that it stands for, and says what is not modelled.
 *
 * Tasks are bits of a mask: task 1 (SECOND) depends on task 0 (FIRST), any others on nothing.
 * Only task 0 may fail.
 */

/* ------------------------------------------------------------------ bounds, by -D */
#ifndef WORKERS
#define WORKERS 3
#endif
#ifndef TASKS
#define TASKS 2
#endif
#ifndef CRASHES    /* workers that die for good; fewer than WORKERS */
#define CRASHES 0
#endif
#ifndef SILENCES   /* requests whose answer never comes, whether they land at once, later or never */
#define SILENCES 0
#endif
#ifndef ALARMS     /* leases of living holders that are judged dead */
#define ALARMS 0
#endif
#ifndef RELEASES   /* holders that let go of a shard with work left */
#define RELEASES 0
#endif
#ifndef SPLITS     /* 0 or 1 */
#define SPLITS 0
#endif
#ifndef BACKUPS    /* tasks that another worker than the holder runs as well */
#define BACKUPS 0
#endif
#ifndef DISCARDS   /* entries that say that the result of task 0 is needless, and deleted next */
#define DISCARDS 0
#endif
/* Entries that a log has room for. That it suffices is asserted, so no search is cut short. */
#ifndef SLOTS
#define SLOTS 12
#endif

#define SHARDS (1 + SPLITS)
#define PARTS  (WORKERS * SHARDS)
#define ALL    ((1 << TASKS) - 1)
#define FIRST  1
#define SECOND 2
#define NOBODY 255

/* In the product the name of a worker is that of its process. TWO_TENDERS: one process tends a shard
 * twice at once, because it claimed it again before it noticed that it had been taken over. */
#ifdef TWO_TENDERS
#define NAME(w) ((w) == WORKERS - 1 -> 0 : (w))
#else
#define NAME(w) (w)
#endif

/* ------------------------------------------------------------------ the store */
mtype = { GENESIS, CLAIM, COMMIT, RELEASE, TAKEOVER, SPLIT, BACKUP, DISCARD };

typedef Entry {
  mtype kind;      /* 0 while the slot is empty */
  byte writer;
  byte nonce;      /* whose attempt it is. An attempt repeats the same bytes until it is settled, so its
                      author makes no other one for the slot, and is all that a random token tells. */
  byte since;      /* for the checks: the entry that made the writer the holder when it did this work */
  bit segment;     /* names a segment */
  byte moved;      /* SPLIT: the tasks that it takes */
  bit gone;        /* the result of task 0 is discarded; part of the index */
  /* the index: the fold of the log up to and including this entry */
  byte holder, tasks, reserved, done, failed, upstream
};

typedef Log {
  Entry e[SLOTS + 1];  /* e[0] is no entry: it says what the plan, or the SPLIT, put into the shard */
  byte length          /* the first empty slot */
};

Log log[SHARDS];

#define OUTCOMES(x)  (x.done | x.failed | x.upstream)
#define PENDING(x)   (x.tasks & ~OUTCOMES(x))
#define COMPLETE(x)  (PENDING(x) == 0)
#define FREE(x)      (!COMPLETE(x) && x.holder == NOBODY)
#define HELD(x)      (!COMPLETE(x) && x.holder != NOBODY)
#define LOWEST(mask) ((mask) & -(mask))

#define NEWEST(s) log[s].e[log[s].length - 1]
#if SPLITS
#define EVERYWHERE(field) (NEWEST(0).field | (log[1].length -> NEWEST(1).field : 0))
#else
#define EVERYWHERE(field) NEWEST(0).field
#endif

/* ------------------------------------------------------------------ the workers */
/* What a worker does about one shard. It tends the shard while it believes to hold it, and else looks for a
 * chance to get it. (A real worker does so for all shards at once; here a process does it for each.) */
mtype = { IDLE, TENDING, STORING, SENT };      /* state */
mtype = { NOTHING, CREATED, EXISTS, SILENCE }; /* answer */

typedef Part {
  mtype state;
  mtype answer;
  byte known;       /* how many slots it has folded, e[0] included: the next entry's number; 0 while idle */
  bit holding;      /* believes that it is the holder */
  bit letting_go;   /* is about to release */
  byte since;       /* the entry by which it became the holder */
  /* outcomes that it has, but are not committed: of tasks that have ended since … */
  byte done, failed, upstream;
  /* … and of those that are being committed */
  byte out_done, out_failed, out_upstream;
  bit stored;       /* the PUT of the segment with out_done was answered */
  bit durable;      /* … and it is there, as only the store knows */
  byte copies;      /* of the attempt that are under way in the network; they may outlive the sender */
  Entry attempt     /* for slot `known` */
};

Part part[PARTS];
bit crashed[WORKERS];
byte crashes, silences, alarms, releases, splits, backups, discards;

#define P     part[me]
#define HERE  log[s].e[P.known - 1]   /* the newest state that it knows: never changed, hence no copy */
#define THERE log[s].e[P.known]       /* the slot that it would write */
#define OWN   (P.done | P.failed | P.upstream | P.out_done | P.out_failed | P.out_upstream)
#define RAN(p) (part[p].done | part[p].failed | part[p].out_done | part[p].out_failed)

/* What it knows of outcomes elsewhere: the newest entry there, for it may read that at any time. */
#if SPLITS
#define ELSEWHERE(field) (log[1 - s].length -> NEWEST(1 - s).field : 0)
#else
#define ELSEWHERE(field) 0
#endif
#define SEEN_DONE   (HERE.done | ELSEWHERE(done))
#define SEEN_FAILED (HERE.failed | HERE.upstream | ELSEWHERE(failed) | ELSEWHERE(upstream))

/* Tasks that need no outcome which another shard still owes. */
#define WITHIN_REACH (PENDING(HERE) & ~OWN & \
  ~(((HERE.tasks | SEEN_DONE | SEEN_FAILED) & FIRST) -> 0 : SECOND))
/* Tasks whose dependencies have outcomes, results that is. */
#define INPUTS_THERE (((P.done | P.out_done | SEEN_DONE) & FIRST) -> ALL : (ALL - SECOND))

#ifdef START_UNRESERVED
#define MAY_START ALL
#elif defined(START_GIVEN_BACK)
#define MAY_START HERE.reserved
#else   /* reserved by the newest entry, and by the one that is under way */
#define MAY_START (HERE.reserved & (P.state == SENT -> P.attempt.reserved : ALL))
#endif

#ifdef IGNORE_DEPENDENCIES
#define STARTABLE (PENDING(HERE) & ~OWN & MAY_START)
#else
#define STARTABLE (PENDING(HERE) & ~OWN & MAY_START & INPUTS_THERE)
#endif

/* The result of task 0 is there, and the task that needs it has its outcome: that is final, so old news do. */
#ifdef DISCARD_EARLY
#define NEEDLESS(x) ((x.done & FIRST) && !x.gone)
#else
#define NEEDLESS(x) ((x.done & FIRST) && !x.gone && ((OUTCOMES(x) | SEEN_ELSEWHERE) & SECOND))
#endif
#define SEEN_ELSEWHERE (ELSEWHERE(done) | ELSEWHERE(failed) | ELSEWHERE(upstream))

inline empty_attempt(i) {
  part[i].attempt.kind = 0; part[i].attempt.writer = 0; part[i].attempt.nonce = 0; part[i].attempt.since = 0;
  part[i].attempt.segment = 0; part[i].attempt.moved = 0; part[i].attempt.gone = 0; part[i].attempt.holder = 0; part[i].attempt.tasks = 0;
  part[i].attempt.reserved = 0; part[i].attempt.done = 0; part[i].attempt.failed = 0; part[i].attempt.upstream = 0
}

inline forget_attempt() {
  P.answer = NOTHING; P.copies = 0;  /* its slot is taken: copies that come late change nothing */
  empty_attempt(me)
}

/* Of a dead worker nothing is left when none of its requests is under way. */
inline forget_what_died(i) {
  if
  :: part[i].copies == 0 -> part[i].known = 0; part[i].durable = 0; empty_attempt(i)
  :: else
  fi
}

inline forget_outgoing() {
  P.out_done = 0; P.out_failed = 0; P.out_upstream = 0; P.stored = 0; P.durable = 0; P.letting_go = 0
}

inline drop_all() {
  P.done = 0; P.failed = 0; P.upstream = 0; P.holding = 0; P.since = 0; P.state = IDLE; P.known = 0;
  forget_outgoing()
}

/* Make an attempt to append an entry of this kind, which leaves the index as it is but for what follows. */
inline prepare(what) {
  assert(P.known <= SLOTS);  /* else the log needs more room for the search to be complete */
  P.attempt.kind = what; P.attempt.writer = NAME(w); P.attempt.nonce = w; P.attempt.since = P.since;
  P.attempt.holder = HERE.holder; P.attempt.tasks = HERE.tasks; P.attempt.reserved = HERE.reserved;
  P.attempt.done = HERE.done; P.attempt.failed = HERE.failed; P.attempt.upstream = HERE.upstream;
  P.attempt.gone = HERE.gone;
  P.answer = NOTHING; P.copies = 1; P.state = SENT
}

/* The outcomes that go into the entry. The first stays: what has one by now is left out. */
inline give_outcomes() {
  P.attempt.segment = ((P.out_done & PENDING(HERE)) != 0);
  P.attempt.done = P.attempt.done | (P.out_done & PENDING(HERE));
  P.attempt.failed = P.attempt.failed | (P.out_failed & PENDING(HERE));
  P.attempt.upstream = P.attempt.upstream | (P.out_upstream & PENDING(HERE))
}

inline prepare_commit() {
  if
  :: P.letting_go ->
     prepare(RELEASE); give_outcomes();
     P.attempt.holder = NOBODY; P.attempt.reserved = 0
  :: else ->
     prepare(COMMIT); give_outcomes();
     if  /* reserve all that it can, or the next task only and give back the others … */
     :: P.attempt.reserved = WITHIN_REACH
     :: P.attempt.reserved = LOWEST(WITHIN_REACH)
     fi;
     /* … but keep what has ended since */
     P.attempt.reserved = (P.attempt.reserved | P.done | P.failed | P.upstream) & PENDING(P.attempt);
     if  /* say that the result of task 0 is needless, or not yet */
     :: discards < DISCARDS && NEEDLESS(HERE) -> discards++; P.attempt.gone = 1
     :: true
     fi
  fi
}

inline prepare_backup() {
  prepare(BACKUP); give_outcomes(); P.attempt.reserved = HERE.reserved & PENDING(P.attempt)
}

inline store_or_prepare() {
  if
#ifndef ENTRY_BEFORE_SEGMENT
  :: P.out_done && !P.stored -> P.state = STORING
#endif
  :: else -> prepare_commit()
  fi
}

inline collect() {
  P.out_done = P.out_done | P.done; P.out_failed = P.out_failed | P.failed;
  P.out_upstream = P.out_upstream | P.upstream;
  P.done = 0; P.failed = 0; P.upstream = 0
}

inline fail_dependents(mask) {
#ifndef NO_UPSTREAM_FAILURE
  P.upstream = P.upstream | (mask & SECOND & PENDING(HERE) & ~OWN)
#else
  skip
#endif
}

/* A backup's outcome came first. What was built on another outcome of that task is worth nothing. */
inline refold() {
#ifndef KEEP_BUILT_ON_BEATEN
  if
  :: (HERE.done & (P.failed | P.out_failed) & FIRST) ||
     ((HERE.failed | HERE.upstream) & (P.done | P.out_done) & FIRST) ->
     P.done = P.done & ~SECOND; P.out_done = P.out_done & ~SECOND;
     P.upstream = P.upstream & ~SECOND; P.out_upstream = P.out_upstream & ~SECOND
  :: else
  fi;
#endif
  P.done = P.done & PENDING(HERE); P.out_done = P.out_done & PENDING(HERE);
  P.failed = P.failed & PENDING(HERE); P.out_failed = P.out_failed & PENDING(HERE);
  P.upstream = P.upstream & PENDING(HERE); P.out_upstream = P.out_upstream & PENDING(HERE)
}

inline lose_memory(i) {
  part[i].state = IDLE; part[i].answer = NOTHING; part[i].holding = 0; part[i].letting_go = 0; part[i].since = 0;
  part[i].done = 0; part[i].failed = 0; part[i].upstream = 0;
  part[i].out_done = 0; part[i].out_failed = 0; part[i].out_upstream = 0; part[i].stored = 0;
  forget_what_died(i)
}

/* The attempt is settled: it won. */
inline won() {
  /* a writer that believes that it won did win */
  assert(THERE.kind == P.attempt.kind && THERE.nonce == w);
  P.known = P.known + 1;
  forget_attempt();
  if
  :: HERE.kind == CLAIM || HERE.kind == TAKEOVER ->
     P.since = (OWN -> P.since : P.known - 1);  /* outcomes from before its time would keep their old date */
     P.holding = 1; P.state = TENDING
  :: HERE.kind == COMMIT && !COMPLETE(HERE) -> forget_outgoing(); P.state = TENDING
  :: else -> drop_all()
  fi
}

/* The attempt is settled: another's entry has the slot, which it now reads. */
inline lost() {
  /* a writer that believes that it lost did lose */
  assert(THERE.kind != 0 && THERE.nonce != w);
  if
  :: P.known = P.known + 1
  :: P.holding && log[s].length > P.known + 1 -> P.known = log[s].length  /* the newest entry tells all */
  fi;
  forget_attempt();
  if
#ifdef NO_FENCING
  :: P.holding && !COMPLETE(HERE) -> refold(); store_or_prepare()
#else
  :: P.holding && !COMPLETE(HERE) && HERE.holder == NAME(w) -> refold(); store_or_prepare()
#endif
#ifdef KEEP_FENCED_WORK
  :: P.holding && !COMPLETE(HERE) && HERE.holder != NAME(w) ->
     P.done = P.done | P.out_done; P.failed = P.failed | P.out_failed; P.upstream = P.upstream | P.out_upstream;
     forget_outgoing(); P.holding = 0; P.state = IDLE; P.known = 0
#endif
  :: else -> drop_all()
  fi
}

/* Workers are alike, so let the one that gets the first entry be called 0: a third of the states. */
#define FIRST_CLAIMED(w) (w == 0 || log[0].length > 1)

#define UP        (!crashed[w])
#define SEARCHING (UP && P.state == IDLE && log[s].length)
#define BUSY      (UP && P.holding && !P.letting_go)
#define OTHERS(x) (HELD(x) && x.holder != NAME(w))
/* What a thief may take: what nobody reserved, with its inputs stored or taken too. */
#define SPARE(x)    (PENDING(x) & ~x.reserved)
#define TAKEABLE(x) (SPARE(x) & (((x.done | SPARE(x)) & FIRST) -> ALL : (ALL - SECOND)))
#define STRAGGLERS(x) \
  (PENDING(x) & x.reserved & (((x.done | ELSEWHERE(done)) & FIRST) -> ALL : (ALL - SECOND)))

proctype Worker(byte w; byte s) {
  byte me = s * WORKERS + w;
  byte task;

end:
  do
  /* ---- Looking for work. To look, to decide and to send are one step here: that the world moves on in between
   * is the same as that the request is long under way. */
  :: atomic { /* claim */
       SEARCHING && FREE(NEWEST(s)) ->
       P.known = log[s].length; prepare(CLAIM); P.attempt.holder = NAME(w);
       if
       :: P.attempt.reserved = PENDING(HERE)
       :: P.attempt.reserved = LOWEST(PENDING(HERE))
       fi }

  :: atomic { /* take over: from a dead worker, or from one whose lease only seems to be dead */
       SEARCHING && OTHERS(NEWEST(s)) && (crashed[NEWEST(s).holder] || alarms < ALARMS) ->
       if
       :: crashed[NEWEST(s).holder]
       :: else -> alarms++
       fi;
       P.known = log[s].length; prepare(TAKEOVER); P.attempt.holder = NAME(w); P.attempt.reserved = 0 }

#if SPLITS
  :: atomic { /* split */
       SEARCHING && s == 0 && OTHERS(NEWEST(s)) && splits < SPLITS && TAKEABLE(NEWEST(s)) ->
       splits++;
       if
       :: task = TAKEABLE(NEWEST(s))
       :: task = LOWEST(TAKEABLE(NEWEST(s)))
       fi;
       P.known = log[s].length; prepare(SPLIT);
       P.attempt.tasks = HERE.tasks & ~task; P.attempt.moved = task; task = 0 }
#endif

#if BACKUPS
  :: atomic { /* back up: run a task that the holder has reserved, too */
       SEARCHING && OTHERS(NEWEST(s)) && backups < BACKUPS && STRAGGLERS(NEWEST(s)) ->
       backups++; P.known = log[s].length;
       /* if it fails, that is the holder's to decide */
       P.out_done = LOWEST(STRAGGLERS(NEWEST(s))); P.state = STORING }
#endif

#if DISCARDS
  :: atomic { /* discard: in a shard that is complete, anybody */
       SEARCHING && COMPLETE(NEWEST(s)) && discards < DISCARDS && NEEDLESS(NEWEST(s)) ->
       discards++; P.known = log[s].length; prepare(DISCARD); P.attempt.gone = 1 }
#endif

  /* ---- tending a shard */
  :: atomic { /* run: also while an entry or a segment is under way */
       BUSY && STARTABLE ->
       task = LOWEST(STARTABLE);
       if
       :: STARTABLE != task -> task = STARTABLE & ~task  /* of two or more, any */
          if :: task = LOWEST(task) :: task & (task - 1) -> task = task & (task - 1) fi
       :: true
       fi;
       assert(!(task & (task - 1)));
       /* its input is there, unless it has been fenced, or beaten by a backup, and does not know yet */
       assert(task != SECOND || !EVERYWHERE(gone) || P.known < log[s].length);
       if
       :: P.done = P.done | task
       :: task == FIRST -> P.failed = P.failed | task; fail_dependents(SECOND)
       fi;
       task = 0 }

#ifndef NO_UPSTREAM_FAILURE
  :: atomic { /* learn that a dependency failed, before this tenure or in another shard */
       BUSY && P.state == TENDING && (SEEN_FAILED & FIRST) && (PENDING(HERE) & ~OWN & SECOND) ->
       fail_dependents(SECOND) }
#endif

  :: atomic { /* commit: something has ended, or nothing reserved can run and other tasks could be reserved */
       BUSY && P.state == TENDING &&
       ((P.done | P.failed | P.upstream) || (!(WITHIN_REACH & HERE.reserved) && WITHIN_REACH)) ->
       collect(); store_or_prepare() }

  :: atomic { /* release */
       BUSY && P.state == TENDING && releases < RELEASES ->
       releases++; P.letting_go = 1; collect(); store_or_prepare() }

  :: atomic { /* the segment's PUT is answered: only now the entry may be sent */
       UP && P.state == STORING ->
       P.stored = 1; P.durable = 1;
       if
       :: P.holding -> prepare_commit()
       :: else -> prepare_backup()
       fi }

  /* ---- the answer */
  :: atomic { /* created */
       UP && P.state == SENT && P.answer == CREATED -> won() }

  :: atomic { /* exists: what is in the slot settles it */
       UP && P.state == SENT && P.answer == EXISTS ->
       if
#ifndef NO_READBACK
       :: THERE.nonce == w -> won()
#endif
       :: else -> lost()
       fi }

  :: atomic { /* no answer: send the same bytes again */
       UP && P.state == SENT && P.answer == SILENCE ->
#ifdef SILENCE_IS_LOSS
       lost()
#elif defined(SILENCE_IS_WIN)
       won()
#else
       P.copies = P.copies + 1; P.answer = NOTHING
#endif
     }

  /* ---- the end */
  :: atomic { /* die, at any step: its memory is gone, but nothing calls back what is under way in the network */
       UP && s == 0 && crashes < CRASHES && log[0].length > 1 ->
       crashes++; crashed[w] = 1;
       lose_memory(w);
#if SPLITS
       lose_memory(WORKERS + w)
#endif
     }
  od
}

/* ------------------------------------------------------------------ the network and the store */

#define BEFORE log[s].e[n - 1]
#define NEW    part[me].attempt
#define GAINED (OUTCOMES(NEW) & ~OUTCOMES(BEFORE))

/* What must hold of an entry at the moment at which it lands. */
inline check() {
  /* rule 1: each slot is written once, in order, and the writer has folded all before */
  assert(log[s].e[n].kind == 0 && n == log[s].length && BEFORE.kind != 0);
  /* what shard.py allows after the state before */
  assert(COMPLETE(BEFORE) == (NEW.kind == DISCARD));
  assert(NEW.kind == DISCARD || (NEW.kind == CLAIM) == (BEFORE.holder == NOBODY));
  /* only what is stored is discarded, once, when the outcome of the task that needs it is committed */
  assert(NEW.gone >= BEFORE.gone && (NEW.kind != DISCARD || NEW.gone > BEFORE.gone));
  assert(NEW.gone == BEFORE.gone || ((BEFORE.done & FIRST) &&
    ((EVERYWHERE(done) | EVERYWHERE(failed) | EVERYWHERE(upstream)) & SECOND)));
  if
  :: NEW.kind == COMMIT || NEW.kind == RELEASE -> /* fencing: by the holder, of its own tenure */
     assert(NEW.writer == BEFORE.holder && NEW.since == tenure[s]);
     /* a task runs only while an entry in the log reserves it */
     assert(!(GAINED & (NEW.done | NEW.failed) & ~BEFORE.reserved))
  :: NEW.kind == TAKEOVER || NEW.kind == BACKUP -> assert(NEW.writer != BEFORE.holder)
  :: NEW.kind == SPLIT ->
     assert(NEW.moved && !(NEW.moved & ~PENDING(BEFORE)) && !(NEW.moved & BEFORE.reserved));
     /* never work that the holder has begun */
     for (p : 0 .. WORKERS - 1) {
       assert(!(part[p].holding && part[p].since == tenure[s] && !crashed[p] && (RAN(p) & NEW.moved)))
     }
  :: else
  fi;
  assert(!(NEW.reserved & ~PENDING(NEW)));
  /* rule 2 */
  assert(!NEW.segment || part[me].durable);
  assert(NEW.segment || !(GAINED & NEW.done));
  /* rule 3: outcomes stay, none is a second one, and they are of tasks in this shard */
  assert((NEW.done & BEFORE.done) == BEFORE.done && (NEW.failed & BEFORE.failed) == BEFORE.failed);
  assert((NEW.upstream & BEFORE.upstream) == BEFORE.upstream);
  assert(!(NEW.done & NEW.failed) && !(NEW.done & NEW.upstream) && !(NEW.failed & NEW.upstream));
  assert(!(GAINED & ~PENDING(BEFORE)));
  assert(!(GAINED & (EVERYWHERE(done) | EVERYWHERE(failed) | EVERYWHERE(upstream))));
  /* rule 4: tasks run after their dependencies, and dependents of failures fail */
  assert(!(GAINED & (NEW.done | NEW.failed) & SECOND) || ((NEW.done | EVERYWHERE(done)) & FIRST));
  assert(!(GAINED & NEW.upstream) ||
    ((GAINED & NEW.upstream) == SECOND && ((NEW.failed | EVERYWHERE(failed)) & FIRST)))
}

inline copy() {
  log[s].e[n].kind = NEW.kind; log[s].e[n].writer = NEW.writer; log[s].e[n].nonce = NEW.nonce;
  log[s].e[n].since = NEW.since; log[s].e[n].segment = NEW.segment; log[s].e[n].moved = NEW.moved;
  log[s].e[n].gone = NEW.gone;
  log[s].e[n].holder = NEW.holder; log[s].e[n].tasks = NEW.tasks; log[s].e[n].reserved = NEW.reserved;
  log[s].e[n].done = NEW.done; log[s].e[n].failed = NEW.failed; log[s].e[n].upstream = NEW.upstream
}

/* Create if absent. */
inline land() {
  n = part[me].known;
  if
#ifdef OVERWRITE
  :: true ->
#else
  :: log[s].e[n].kind == 0 ->
#endif
     check();
     copy();
     log[s].length = n + 1;
     if
     :: NEW.kind == CLAIM || NEW.kind == TAKEOVER -> tenure[s] = n
     :: NEW.kind == SPLIT ->
        log[1].e[0].kind = GENESIS; log[1].e[0].holder = NOBODY; log[1].e[0].tasks = NEW.moved; log[1].length = 1
     :: else
     fi;
     answer = CREATED
  :: else -> answer = EXISTS
  fi;
  n = 0
}

byte tenure[SHARDS];  /* for the checks: the entry that made the holder */

#define ASKED (!crashed[w] && part[me].state == SENT && part[me].answer == NOTHING)

/* Carries the requests of one worker about one shard. */
proctype Network(byte w; byte s) {
  byte me = s * WORKERS + w;
  byte n, p;
  mtype answer;
end:
  do
  :: atomic { /* a request lands and is answered; or lands, but the answer is lost */
       part[me].copies && (ASKED || crashed[w]) && FIRST_CLAIMED(w) ->
       land();
       part[me].copies = part[me].copies - 1;
       if
       :: ASKED -> part[me].answer = answer
       :: ASKED && silences < SILENCES -> silences++; part[me].answer = SILENCE
       :: crashed[w] -> forget_what_died(me)
       fi;
       answer = 0; p = 0 }
  :: atomic { /* an earlier copy lands, whose answer nobody waits for any more */
       part[me].copies && !crashed[w] && FIRST_CLAIMED(w) &&
       (part[me].answer == SILENCE || (ASKED && part[me].copies > 1)) ->
       land();
       part[me].copies = part[me].copies - 1;
       answer = 0; p = 0 }
  :: atomic { /* 409, 503 or a broken connection: nothing landed */
       part[me].copies && ASKED && silences < SILENCES ->
       silences++; part[me].copies = part[me].copies - 1; part[me].answer = SILENCE }
  :: atomic { /* a time-out; the request is still under way */
       part[me].copies && ASKED && silences < SILENCES -> silences++; part[me].answer = SILENCE }
  :: atomic { /* an earlier copy, or the request of a dead worker, never lands */
       part[me].copies && (crashed[w] || part[me].answer == SILENCE) ->
       part[me].copies = part[me].copies - 1;
       if
       :: crashed[w] -> forget_what_died(me)
       :: else
       fi }
  od
}

/* ------------------------------------------------------------------ begin and end */

init {
  byte w, s, n, seen;
  atomic {
    log[0].e[0].kind = GENESIS; log[0].e[0].holder = NOBODY; log[0].e[0].tasks = ALL; log[0].length = 1;
    for (s : 0 .. SHARDS - 1) {
      for (w : 0 .. WORKERS - 1) {
        part[s * WORKERS + w].state = IDLE; part[s * WORKERS + w].answer = NOTHING;
        run Network(w, s)
      }
    }
    for (s : 0 .. SHARDS - 1) {
      for (w : 0 .. WORKERS - 1) { run Worker(w, s) }
    }
    w = 0; s = 0
  }
  /* All budgets are finite and nobody acts without cause, so each execution comes to a state in which nothing more
   * can happen. Somebody is alive in it; then all must be done, else the run would hang for ever: */
  timeout ->
  d_step {
    assert((EVERYWHERE(done) | EVERYWHERE(failed) | EVERYWHERE(upstream)) == ALL);
    for (w : 0 .. PARTS - 1) { assert(crashed[w % WORKERS] || part[w].state != STORING && part[w].state != SENT) }
    w = 0;
    /* folding the entries one by one gives each task one outcome, and that of the newest index */
    for (s : 0 .. SHARDS - 1) {
      for (n : 1 .. SLOTS) {
        if
        :: log[s].e[n].kind != 0 ->
           assert(!(seen & OUTCOMES(log[s].e[n]) & ~OUTCOMES(log[s].e[n - 1])));
           seen = seen | OUTCOMES(log[s].e[n])
        :: else
        fi
      }
    }
    assert(seen == ALL); s = 0; n = 0
  }
}

/* The same said in temporal logic. The search for it is one for cycles, with weak fairness. */
#ifdef LIVENESS
#define ENDED (log[0].length > 0 && OUTCOMES(NEWEST(0)) == ALL)
ltl every_task_gets_an_outcome { <> (ENDED) }
#endif
