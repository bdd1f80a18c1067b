"""Count the most frequent n-grams of token arrays: exact, on all cores, within a memory budget, resumable.

The task: of all n-grams of 2 … N tokens, the first S by (count descending, length ascending, tokens lexicographic),
with exact counts. (The ranking by gain takes these as candidates, of N + 1 tokens too: ``ranking``.)

A corpus of 43 M tokens has about 100 M different ones, so counting them all and dropping most is what this algorithm
avoids.

**Level by level.** An n-gram occurs at most as often as its prefix and its suffix (its first and its last n − 1
tokens). So level n counts only those whose prefix and suffix survived level n − 1. Every surviving n-gram gets an
*id*, its index in lexicographic order; every position of the corpus carries the id of the survivor that ends there, or
``NO_ID``. The *key* of the n-gram that ends at position i is then a single number whatever n is:

    key(i) = id(i − 1) · num_ids + id(i)          prefix, then suffix

Ids are lexicographic, so keys compare as token sequences do, and a key leads back to its tokens through the levels.

**The floor rises.** ``min_freq`` is the fewest occurrences that count at first. Once S n-grams with at least c
occurrences are known, another one of the same level needs c (it may come first among equals), a longer one c + 1 (ties
go to the shorter). The answer is the same, and fewer than S n-grams a level get an id whatever the corpus: memory for
survivors is bounded by S, not by the corpus. See ``levels.RisingFloor``.

**Partitions that fit the L2 cache.** Counting is a hash table, and a hash table larger than the cache costs a miss a
key. So keys are shuffled by a multiplication by an odd number modulo a power of two, which spreads them evenly and can
be undone. The upper bits of the product name the *partition*, and only the lower bits, the *remainder*, are stored:
mostly 32 bits. A partition has about 50,000 different n-grams. See ``kernels/ngram_count.py`` for the loops.

**One level is two passes over blocks of positions, and one over partitions:**

    advance   each block: remainders → ids (a table per partition) → order of positions → keys of the next level
              → partition of each position (16 bits) and remainders sorted by partition
    count     each partition: its remainders from all blocks into one table; what reaches the floor goes to a pool
    rank      the pool keeps the first S by (count, key); sorted by key they are the level's survivors

The way back from partitions to positions needs no sort: each position remembers its partition, and the remainders of a
partition are in the order of positions, so one pass that reads every partition's stream front to back restores them.
Six bytes a position (ten where remainders need 64 bits) are all that lies between passes.

**Memory and disk.** ``plan.plan_count`` chooses sizes for a memory budget. Blocks stay in memory where they fit; else
each is three plain ``.npy`` files in the work folder, and partitions are counted in groups that fit.

**Resuming.** A finished level is a small ``.npz`` of its survivors. A count that is started again with the same
tokens and options loads them, brings its blocks to the first unfinished level (which costs a pass a level and no
counting) and goes on there. Blocks of an interrupted count are thrown away, so they need no checksums, no journal and
no syncing. Neither budget nor threads change survivors, so both may differ when a count is resumed.

**Threads.** The loops release the GIL; a thread reads, computes and writes a block or a partition of its own, so
cores and disk overlap. Results do not depend on the order in which threads finish.

**Clusters.** ``spark.count_f_grams_on_spark`` has Apache Spark add up what each slice of the corpus holds; keys, floor,
ties and ranking are the code of this package, so the result is equal, statistics included.

Files: ``count`` the function and its result · ``engine`` the passes · ``levels`` keys, floor, pool, ids and ranks ·
``blocks`` the corpus and its blocks in memory or files · ``plan`` sizes · ``spark``.
Measurements, and what was tried and left: docs/decisions/0006-counting.md.
"""

from scone.tokenization.counting.count import CountResult, CountStatistics, LevelStatistics, count_f_grams

__all__ = ["CountResult", "CountStatistics", "LevelStatistics", "count_f_grams"]
