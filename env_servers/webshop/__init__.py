"""The shop of the WebShop benchmark, without Java, HTML parsing or a model that tags nouns.

Source: princeton-nlp/WebShop, the text environment (`web_agent_site/envs/web_agent_text_env.py`),
its engine and goals. On the official small set the texts, clickables, goals, prices, rankings and
rewards are the same, byte for byte. Differences:

1. `search[<c>]` and `search[<a> ..]` raise in the original and leave a session in which buying
   raises, too. Here they have no effect, with a message, and an open product stays open.
2. `search[<r>]` draws 50 products from the process's random stream, for every page of results.
   Here the session's name determines them, once for each search.
3. The original distinguishes pages by words in their address, so that a search for
   `search_results`, `item_page` or `done` changes later buttons. Here it is like any other search.
4. `next >` continues without end, as in the original; on pages after the last result
   `Outcome.message` says so. It also says why an action had no effect. No text changes by it.
5. The original finds the nouns of titles with spaCy. Its code at 64fa2a5, from which the
   recorded episodes come, and the copy in verl-agent load `en_core_web_sm`; later code of the
   original (6ba9969) loads `en_core_web_lg`, and rewards options by other rules. Here it is
   `en_core_web_sm` with the corresponding rules. Without spaCy and this model the nouns
   are approximated, see `nouns`; `Shop.tagger.name` says which method was used.
6. Reviews in the data are shown, and the mean of their stars is the rating. The official files have
   none: `Rating: N.A.`, and nothing on the page of reviews.
7. The original seeds its draws only before it shuffles the goals. Here `goal_seed` also seeds those
   of prices and limits, so that a goal is the same in every process. Goals are named by their
   index; the original's random choice of one at a reset is not offered.
8. A product that the attribute file lacks has no goal, and data of another form raises
   a `ShopDataError` that names it; the original raises `KeyError` or similar. Lone surrogates in
   the data become U+FFFD.
9. Everything that is listed as clickable can be clicked: `click[..]` around a listed name is that
   click whatever the name is. In the original an option whose value has an opening bracket or is
   `search` cannot be chosen. A choice without a text is not listed, since no action can name it.
10. An action of more than 10,000 characters has no effect. Of a search the first 1,000 characters
   count; the original's search engine refuses searches of more than 1,024 different words.

Kept from the original, although unexpected: the plain text does not show which options are chosen;
the page after a purchase does not show the goal; a search is possible from every page, also after
the purchase; `search` is listed on the search page, where clicking it has no effect.
"""
