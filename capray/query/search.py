"""Full-text search over the captions: BM25 in plain SQL, for DuckDB's own is an extension to download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capray.errors import ConfigError
from capray.vocabulary import tokenise

if TYPE_CHECKING:
    import duckdb

# Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", section 3.4; k1 and b are those
# of Lucene and of DuckDB's fts, idf is Lucene's, which is never negative.
_K1, _B = 1.2, 0.75


def search_sql(connection: duckdb.DuckDBPyConnection, text: str, where: str | None) -> str:
    """The query for the captions with a word of ``text`` (in any of its English inflections), best first.

    Its columns are image_id, caption, relevance and score.

    Raises:
        ConfigError: ``text`` has no word.
    """
    from nltk.stem.snowball import SnowballStemmer

    stem = SnowballStemmer("english").stem
    stems = list(dict.fromkeys(stem(word) for word in tokenise(text)))
    if not stems:
        raise ConfigError(f"{text!r} holds no word to search for")
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE tokenised AS
        SELECT image_id, caption, score, string_split(lower(caption), ' ') AS words_
        FROM captions {f"WHERE {where}" if where else ""}"""
    )
    words = connection.execute("SELECT DISTINCT unnest(words_) FROM tokenised").fetchall()
    inflections: dict[str, list[str]] = {wanted: [] for wanted in stems}
    for (word,) in words:
        if (found := stem(word)) in inflections:
            inflections[found].append(word)
    connection.execute("CREATE OR REPLACE TEMP TABLE terms (words VARCHAR[])")
    connection.executemany("INSERT INTO terms VALUES (?)", [[words] for words in inflections.values()])
    return f"""
        WITH counted AS (
            SELECT image_id, caption, score, len(words_) AS length,
                   list_transform((SELECT list(words) FROM terms),
                                  lambda term: len(list_filter(words_, lambda w: list_contains(term, w)))) AS counts
            FROM tokenised
        ), corpus AS (SELECT count(*) AS size, avg(length) AS mean FROM counted),
        weights AS (
            SELECT list(ln(1 + (size - n + 0.5) / (n + 0.5)) ORDER BY i) AS idf
            FROM (SELECT i, count(*) FILTER (counts[i] > 0) AS n
                  FROM counted, range(1, {len(stems) + 1}) AS places(i) GROUP BY i), corpus
        )
        SELECT image_id, caption, round(list_sum(list_transform(range(1, {len(stems) + 1}), lambda i:
            idf[i] * counts[i] * {_K1 + 1} / (counts[i] + {_K1} * (1 - {_B} + {_B} * length / mean)))), 3) AS relevance,
            round(score::DOUBLE, 3) AS score
        FROM counted, corpus, weights WHERE list_sum(counts) > 0
        ORDER BY relevance DESC, score DESC, image_id
    """
