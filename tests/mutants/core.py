"""The rules of keyvault's trust core and its upkeep, each taken out, and the test that must notice."""

from __future__ import annotations

from tests.mutants.table import Mutant

_KV = "services/keyvault/"
_RULES = "tests/security/test_core_rules.py::"
_ATTACKS = "tests/security/test_core_regressions.py::"
_PURE = "tests/unit/test_lifecycle.py::"
_WRITTEN = _RULES + "test_what_keyvault_did_not_write_is_refused_at_once"
_OLD = _RULES + "test_an_older_row_with_all_that_belongs_to_it_is_rolled_back"
_LED = _RULES + "test_a_newer_row_is_believed_only_where_the_events_lead_to_it"
_LATE = _RULES + "test_nothing_is_opened_after_an_end_or_a_long_pause"
_ONCE = _RULES + "test_a_grant_is_redeemed_once_whoever_is_asked"
_NAMED = _RULES + "test_the_deployments_own_row_holds_a_tenant_by_name"
_LOGGED = _RULES + "test_a_log_that_is_not_what_was_anchored_stops_every_lease"
_WORD = _RULES + "test_an_operators_word_seals_rows_as_they_are_and_forgets_the_rest"
_NEXT_WORD = _ATTACKS + "test_an_operators_word_after_the_anchor_was_lost"
_ANSWERED = _RULES + "test_a_change_is_answered_once_the_anchor_covers_it_and_not_before"
_CAP = _RULES + "test_a_cap_holds_over_replicas_and_restarts"

MUTANTS = (
    # A tenant is one object under one MAC.
    Mutant(
        "a row's MAC is not looked at",
        _KV + "ledger.py",
        "        if not expected or not hmac.compare_digest(mac, expected):\n",
        "        if not expected:\n",
        (_WRITTEN,),
    ),
    Mutant(
        "an empty MAC of a key that there is not is right",
        _KV + "ledger.py",
        "        if not expected or not hmac.compare_digest(mac, expected):\n",
        "        if not hmac.compare_digest(mac, expected):\n",
        (_WRITTEN,),
    ),
    Mutant(
        "the MAC is of no name",
        _KV + "ledger.py",
        "            self._deployment,\n            name,\n            head.generation,\n",
        "            self._deployment,\n            head.generation,\n",
        (_WRITTEN,),
    ),
    Mutant(
        "the MAC is of no generation",
        _KV + "ledger.py",
        "            name,\n            head.generation,\n            head.sequence,\n",
        "            name,\n            head.sequence,\n",
        (_WRITTEN,),
    ),
    Mutant(
        "the MAC is of no state",
        _KV + "ledger.py",
        "            head.hash,\n            state_digest,\n            usage_digest,\n        )\n",
        "            head.hash,\n            usage_digest,\n        )\n",
        (_WRITTEN,),
    ),
    Mutant(
        "the MAC is of no usage",
        _KV + "ledger.py",
        "            head.hash,\n            state_digest,\n            usage_digest,\n        )\n",
        "            head.hash,\n            state_digest,\n        )\n",
        (_WRITTEN,),
    ),
    Mutant(
        "a part that is missing is none",
        _KV + "ledger.py",
        "            if sum(row[0] == number for row in rows) != 1:\n"
        "                raise lifecycle.tampered(tenant.name)\n",
        "            if number not in stored:\n"
        "                digest = None\n"
        "                tenant.parts[number] = Part(state_pb2.PartState(), state_pb2.PartUsage())\n"
        "                continue\n",
        (_WRITTEN,),
    ),
    Mutant(
        "a part's state is not held against its digest",
        _KV + "ledger.py",
        "                hmac.compare_digest(hashlib.sha256(state).digest(), digest)\n",
        "                True\n",
        (_WRITTEN,),
    ),
    Mutant(
        "a part's usage is not held against its digest",
        _KV + "ledger.py",
        '                and hmac.compare_digest(usage_digest, usages.get(number, b""))\n',
        "",
        (_WRITTEN,),
    ),
    Mutant(
        "any ciphertext is opened",
        _KV + "ledger.py",
        "        if stored is None or not hmac.compare_digest(secret_digest(*stored), digest):\n",
        "        if stored is None:\n",
        (_WRITTEN,),
    ),
    Mutant(
        "ciphertext that is not what the state names is on no record",
        _KV + "lease.py",
        '            if isinstance(error, ByokeepError) and error.reason == "ROW_TAMPERED":\n',
        "            if False:\n",
        (_WRITTEN,),
    ),
    Mutant(
        "a head names a state and no usage",
        _KV + "ledger.py",
        "hashlib.sha256(state_digest + usage_digest).digest()",
        "hashlib.sha256(state_digest).digest()",
        (_RULES + "test_every_change_names_its_state_and_usage_in_its_last_event",),
    ),
    # It is the newest.
    Mutant(
        "an older row is believed",
        _KV + "heads.py",
        "        if not newer or not await leads(connection, name, known, row):\n",
        "        if newer and not await leads(connection, name, known, row):\n",
        (_OLD,),
    ),
    Mutant(
        "a row above the known head is believed",
        _KV + "heads.py",
        "        if not newer or not await leads(connection, name, known, row):\n",
        "        if not newer:\n",
        (_LED,),
    ),
    Mutant(
        "events between heads may be missing",
        _KV + "heads.py",
        "        if not rows:\n            return False\n",
        "        if not rows:\n            return True\n",
        (_LED,),
    ),
    Mutant(
        "events between heads need not lead to the row's",
        _KV + "heads.py",
        "    return sequence == newer.sequence and hmac.compare_digest(digest, newer.hash)\n",
        "    return sequence == newer.sequence\n",
        (_LED,),
    ),
    Mutant(
        "what the log has is not known",
        _KV + "heads.py",
        "        self._logged[name] = leaf\n",
        "",
        (_OLD, _ANSWERED),
    ),
    Mutant(
        "a tenant that is gone never was",
        _KV + "ledger.py",
        "            if self._heads.knows(name):\n"
        "                raise lifecycle.rolled_back(name)\n"
        "            raise lifecycle.tenant_key_missing(name)\n",
        "            raise lifecycle.tenant_key_missing(name)\n",
        (_WRITTEN,),
    ),
    Mutant(
        "a known name is created again",
        _KV + "ledger.py",
        "            if self._heads.knows(name):\n"
        "                raise lifecycle.rolled_back(name)\n"
        "            head = Head(",
        "            head = Head(",
        (_RULES + "test_a_name_is_not_created_again",),
    ),
    Mutant(
        "what this process committed it does not remember",
        _KV + "ledger.py",
        "            self._heads.remember(name, one.head, one.bodies)\n",
        "",
        (_ANSWERED,),
    ),
    # The log and its anchor.
    Mutant(
        "leaves need not be what was anchored",
        _KV + "log.py",
        "            if frontier.root() != anchored.root:\n",
        "            if False:\n",
        (_RULES + "test_a_root_that_is_not_the_anchors_stops_every_lease",),
    ),
    Mutant(
        "leaves are taken for what they say",
        _KV + "log.py",
        "            if blind and hmac.compare_digest(leaf.leaf_hash, own.leaf_hash):\n",
        "            if True:\n",
        (_LOGGED, _RULES + "test_a_leaf_that_somebody_plants_is_none"),
    ),
    Mutant(
        "a leaf's blind may be anybody's",
        _KV + "log.py",
        "            blind = hmac.compare_digest(leaf.blind, own.blind)\n",
        "            own, blind = replace(leaf, leaf_hash=leaf_hash(fields(leaf.blind, chain_of(leaf.tenant), leaf.sequence, leaf.head_hash))), True\n",
        (_RULES + "test_a_leaf_that_somebody_plants_is_none",),
    ),
    Mutant(
        "a contradiction is forgotten with its process",
        _KV + "log.py",
        "            if not await self._store.write(said.text(self._deployment), before):\n",
        "            if False:\n",
        (_RULES + "test_a_verdict_stands_though_the_anchor_could_not_be_told",),
    ),
    Mutant(
        "a log without an anchor is a new one",
        _KV + "log.py",
        "            if before.text is None and await sql.size(connection):\n",
        "            if False:\n",
        (_RULES + "test_a_log_without_its_anchor_is_no_new_one",),
    ),
    Mutant(
        "a tick that lost the anchor succeeded",
        _KV + "log.py",
        "            self._wake.set()\n            return False\n",
        "            self._wake.set()\n",
        (_ANSWERED,),
    ),
    Mutant(
        "a head is answered for by its number alone",
        _KV + "log.py",
        " or not await self._has(name, head):\n",
        ":\n",
        (_ATTACKS + "test_a_change_of_a_branch_that_lost_is_not_answered",),
    ),
    Mutant(
        "a leaf beyond the anchor goes on from anything",
        _KV + "log.py",
        "        return leaf.generation != before.generation or await leads(\n"
        "            connection, leaf.tenant, before, leaf.head\n"
        "        )\n",
        "        return bool(before)\n",
        (_ATTACKS + "test_a_leaf_that_was_kept",),
    ),
    Mutant(
        "leaves count as learned before they are",
        _KV + "log.py",
        "            frontier = self._frontier.copy()\n",
        "            frontier = self._frontier\n",
        (_ATTACKS + "test_a_log_whose_reading_is_cut_short",),
    ),
    Mutant(
        "a change that changed nothing is as old as what was known",
        _KV + "ledger.py",
        "done[0].head if done else _whole(found[name]).head\n",
        "done[0].head if done else self._heads.get(name)\n",
        (_ATTACKS + "test_a_repeated_request_is_answered_by_another_process",),
    ),
    Mutant(
        "heads that no leaf names are left",
        _KV + "log.py",
        "        if not self.rolled_back:\n            await self.scan()\n",
        "",
        (_RULES + "test_a_start_owes_to_the_log_what_no_leaf_names",),
    ),
    Mutant(
        "leases go on while the database contradicts its anchor",
        _KV + "log.py",
        "        if self.rolled_back:\n            return ByokeepError(\n",
        "        if False:\n            return ByokeepError(\n",
        (_LOGGED,),
    ),
    Mutant(
        "leases go on whatever a tick's age",
        _KV + "log.py",
        '        return stale("anchored") if self.age > STALE_SECONDS else None\n',
        "        return None\n",
        (_RULES + "test_no_lease_on_a_tick_that_is_too_old",),
    ),
    Mutant(
        "an operator's word seals what is not authentic",
        _KV + "ledger.py",
        '                    logs.failure(log, "row_not_sealed", error, tenant=name)\n'
        "                    continue\n",
        '                    logs.failure(log, "row_not_sealed", error, tenant=name)\n'
        "                    raise\n",
        (_WORD,),
    ),
    Mutant(
        "an operator's word raises no generation",
        _KV + "log.py",
        "            async for name, head in self._ledger.reseal(connection, generation):\n",
        "            generation = anchored.generation\n"
        "            async for name, head in self._ledger.reseal(connection, generation):\n",
        (_WORD,),
    ),
    Mutant(
        "an operator's word counts no leaf",
        _KV + "log.py",
        "                generation = max(generation, leaf.generation + 1)\n",
        "",
        (_NEXT_WORD,),
    ),
    Mutant(
        "an operator's word counts no word that only the process knows",
        _KV + "log.py",
        "            generation = max(anchored.generation, self._heads.generation) + 1\n",
        "            generation = anchored.generation + 1\n",
        (_NEXT_WORD,),
    ),
    Mutant(
        "an operator's word is not written over what another replica anchored",
        _KV + "log.py",
        "_TRIES: Final = 5\n",
        "_TRIES: Final = 1\n",
        (_ATTACKS + "test_an_operators_word_that_another_replica_crosses",),
    ),
    Mutant(
        "another replica's word is not heard",
        _KV + "log.py",
        "            if anchored.generation != self._heads.generation:\n",
        "            if False:\n",
        (_WORD,),
    ),
    Mutant(
        "what is irreversible goes on after an operator's word",
        _KV + "log.py",
        "        return self.rolled_back or since < QUIET_SECONDS\n",
        "        return self.rolled_back\n",
        (_WORD,),
    ),
    # A lease.
    Mutant(
        "grants: redeemed as often as one likes",
        _KV + "lease.py",
        "        if limits.used(tenant.usage, grant) or limits.grant_digest(grant) in self._redeemed:\n",
        "        if False:\n",
        (_ONCE,),
    ),
    Mutant(
        "grants: a process forgets what it redeemed",
        _KV + "lease.py",
        " or limits.grant_digest(grant) in self._redeemed:\n",
        ":\n",
        (_RULES + "test_a_process_remembers_what_it_redeemed_whatever_branch_counts",),
    ),
    Mutant(
        "grants: time is not looked at",
        _KV + "lease.py",
        "        check_time(grant, tenant.now)\n",
        "",
        (_RULES + "test_time_is_the_processs_own",),
    ),
    Mutant(
        "grants: any provider and owner",
        _KV + "lease.py",
        "        if (provider_value(key.provider), key.owner) != (grant.provider, grant.owner):\n",
        "        if False:\n",
        ("tests/security/test_grants.py::test_grant_mutation_signed",),
    ),
    Mutant(
        "a version of any state is leased",
        _KV + "lease.py",
        "        _check_state(grant, version)\n",
        "",
        (_RULES + "test_what_one_replica_ends_the_other_does_not_give",),
    ),
    Mutant(
        "a held tenant is leased",
        _KV + "lease.py",
        "        if tenant.state.held or self._log.held(tenant.name):\n",
        "        if False:\n",
        (_NAMED,),
    ),
    Mutant(
        "a hold by name holds nothing",
        _KV + "log.py",
        "            tenant in self.system.held\n            or tenant in self.system.shredded\n",
        "            tenant in self.system.shredded\n",
        (_NAMED,),
    ),
    Mutant(
        "a tenant that was shredded by name is leased",
        _KV + "log.py",
        "            or tenant in self.system.shredded\n",
        "",
        (_NAMED,),
    ),
    Mutant(
        "a tenant is leased before what it is owed was carried out",
        _KV + "log.py",
        "            or any(one.tenant == tenant for one in self.system.owed)\n",
        "",
        (_NAMED,),
    ),
    Mutant(
        "caps are not held",
        _KV + "lease.py",
        "        self._check_caps(tenant, grant.key_id)\n",
        "",
        (_CAP,),
    ),
    Mutant(
        "no cap: in_flight",
        _KV + "limits.py",
        "    if 0 < caps.in_flight <= live:\n",
        "    if False:\n",
        (_PURE + "test_a_cap_is_held_exactly", _CAP),
    ),
    Mutant(
        "a lease is not told from one that ended",
        _KV + "lease.py",
        " if not one.ended and one.expire_millis > now]",
        "]",
        (
            "tests/security/test_rogue_orchestrator.py::test_whatever_ends_a_lease_gives_its_place_back",
        ),
    ),
    Mutant(
        "a key is opened after an end that this process knows of",
        _KV + "lease.py",
        " or self._ledger.ends[tenant] != redeemed.ends:\n",
        ":\n",
        (_LATE,),
    ),
    Mutant(
        "a key is opened by a process that was stopped since its tick",
        _KV + "lease.py",
        "        if late or self._log.age > STALE_SECONDS or",
        "        if late or",
        (_LATE,),
    ),
    Mutant(
        "a failed lease stays alive",
        _KV + "lease.py",
        "            lambda tenant: ended_early(tenant, redeemed.lease, kind, failure.reason),\n",
        "            lambda tenant: None,\n",
        (_LATE,),
    ),
    Mutant(
        "a version that does not open is not marked",
        _KV + "release.py",
        "        version.unopened_reason = reason\n",
        "        version.unopened_reason = ''\n",
        (_RULES + "test_a_lost_kek_is_no_other_key",),
    ),
    Mutant(
        "anybody ends a lease",
        _KV + "release.py",
        "        if (place.holder if lease is None else lease.holder) != end.holder:\n",
        "        if False:\n",
        ("tests/component/test_keyvault.py::test_another_runner_can_not_release_a_lease",),
    ),
    Mutant(
        "a single rejected review retires a key",
        _KV + "release.py",
        "        if rejected and event.purpose == grant_pb2.LEASE_PURPOSE_VALIDATION:\n",
        "        if rejected:\n",
        ("tests/component/test_keyvault.py::test_a_single_rejected_review_does_not_retire_a_key",),
    ),
    # Single use and caps, as they are kept.
    Mutant(
        "a grant that can't be told from a used one is taken",
        _KV + "limits.py",
        "    if grant.expire_time.seconds <= usage.grants_floor:\n        return True\n",
        "",
        (_PURE + "test_a_full_list_refuses_what_it_can_not_tell_from_a_used_grant",),
    ),
    Mutant(
        "a grant is refused by its end before it is over",
        _KV + "limits.py",
        "    over, first = int(now.timestamp()) - 2 * skew_seconds, 0\n",
        "    over, first = int(now.timestamp()) - 1, 0\n",
        (_PURE + "test_a_grant_that_is_over_is_forgotten_and_refused_by_its_end",),
    ),
    Mutant(
        "a clock that goes back opens a window anew",
        _KV + "limits.py",
        "    if seconds // _DAY > meter.day:\n",
        "    if seconds // _DAY != meter.day:\n",
        (_PURE + "test_a_clock_that_goes_back_opens_no_window_anew",),
    ),
    # What a key may become.
    Mutant(
        "a version that was replaced is promoted again",
        _KV + "lifecycle.py",
        "    if state is not State.PENDING:\n",
        "    if state in (State.REVOKED, State.DESTROYED):\n",
        (_PURE + "test_only_a_pending_version_is_promoted",),
    ),
    Mutant(
        "what was replaced before keeps its way back",
        _KV + "lifecycle.py",
        "        elif state_of(one) in (State.SUPERSEDED, State.NEEDS_REKEY):\n",
        "        elif state_of(one) in (State.NEEDS_REKEY,):\n",
        (_PURE + "test_a_promotion",),
    ),
    Mutant(
        "a key is rolled back after its grace",
        _KV + "lifecycle.py",
        "    if not previous or _grace_end(previous[-1]) < now.timestamp():\n",
        "    if not previous:\n",
        (_PURE + "test_a_rollback_within_its_grace_and_not_after_it",),
    ),
    Mutant(
        "the end of a key is of its active version",
        _KV + "lifecycle.py",
        "        if state_of(one) not in (after, State.DESTROYED)\n    ]\n",
        "        if state_of(one) is State.ACTIVE\n    ]\n",
        (_PURE + "test_the_end_of_a_key_is_of_every_version",),
    ),
    Mutant(
        "a key that is gone gets a new version",
        _KV + "lifecycle.py",
        "    if state is State.REVOKED:\n",
        "    if False:\n",
        (_PURE + "test_no_version_is_added_to_a_key_that_is_gone",),
    ),
    Mutant(
        "a change is not held against its etag",
        _KV + "lifecycle.py",
        "    if wanted and wanted != etag(key):\n",
        "    if False:\n",
        (_PURE + "test_an_etag_is_of_one_revision",),
    ),
    Mutant(
        "a request id with other content is taken for the same",
        _KV + "custody.py",
        "            if one.content != past.content:\n",
        "            if False:\n",
        (_RULES + "test_the_same_request_is_carried_out_once",),
    ),
    Mutant(
        "what a damaged tenant is owed is lost",
        _KV + "custody.py",
        "                await self._owe(tenant, key_id, origin, after)\n",
        "                pass\n",
        (_RULES + "test_an_end_asked_of_a_damaged_tenant_is_kept_and_holds_it",),
    ),
    # Upkeep: what follows from a state.
    Mutant(
        "something is stored under a KEK version that is about to be destroyed",
        _KV + "lifecycle.py",
        "    return kek_version >= max(kek.trimming, kek.trimmed)\n",
        "    return kek_version >= kek.trimmed\n",
        (_PURE + "test_nothing_is_stored_where_a_kek_is_about_to_be_destroyed",),
    ),
    Mutant(
        "a destroyed version is owed no trim",
        _KV + "lifecycle.py",
        "                holding.destroyed = max(holding.destroyed, one.kek_version)\n",
        "",
        (_PURE + "test_what_a_part_says_of_its_keys",),
    ),
    Mutant(
        "a trim of the version itself is enough",
        _KV + "lifecycle.py",
        "        if one.destroyed and one.destroyed >= kek_of(state, one.backend).trimmed:\n",
        "        if one.destroyed and one.destroyed > kek_of(state, one.backend).trimmed:\n",
        (_PURE + "test_a_destroyed_version_is_owed_a_trim_until_its_kek_version_is_gone",),
    ),
    Mutant(
        "what another backend holds is where it is to be",
        _KV + "lifecycle.py",
        "        if one.backend != state.target_backend or one.oldest < state.target_version\n",
        "        if one.oldest < state.target_version\n",
        (_PURE + "test_what_is_left_to_be_wrapped",),
    ),
    Mutant(
        "nothing is due where a destroyed version is owed a trim",
        _KV + "lifecycle.py",
        "        times.append(state.owed_since + shred_after)\n",
        "        pass\n",
        (_PURE + "test_when_something_is_to_be_done",),
    ),
    # What is not known yet is not somebody else's, and what is known is not lost.
    Mutant(
        "a leaf of a MAC key that is not opened yet is nobody's",
        _KV + "log.py",
        "        if not self._macs.complete:\n            raise stale",
        "        if False:\n            raise stale",
        (_ATTACKS + "test_a_mac_key_that_a_replica_can_not_open_yet",),
    ),
    Mutant(
        "what is owed goes on from any leaf of a lower number",
        _KV + "log.py",
        "there.sequence < head.sequence and await leads",
        "there.sequence < head.sequence or await leads",
        (_ATTACKS + "test_a_longer_branch_beside_a_leaf_that_is_not_anchored",),
    ),
    Mutant(
        "what an operator's word took in is told as lost",
        _KV + "log.py",
        "                if not await leads(connection, name, head, anchored):\n",
        "                if True:\n",
        (_ATTACKS + "test_an_operators_word_beside_what_another_replica_owes",),
    ),
    Mutant(
        "retention asks for an event's age alone",
        _KV + "upkeep/retention.py",
        "young = young or at > high or ",
        "young = young or ",
        (_ATTACKS + "test_no_event_is_cut_off_that_no_leaf_covers",),
    ),
    Mutant(
        "a verdict that the anchor did not take is forgotten",
        _KV + "log.py",
        "            if anchored.distrusted or self._verdict:\n",
        "            if anchored.distrusted:\n",
        (_RULES + "test_a_verdict_stands_though_the_anchor_could_not_be_told",),
    ),
    Mutant(
        "a row with a NULL is read like any other",
        _KV + "database.py",
        "    return [row for row in rows if None not in row]\n",
        "    return list(rows)\n",
        (_RULES + "test_a_part_that_is_there_twice_once_with_nothing_in_it", _WRITTEN),
    ),
    Mutant(
        "a star stands for a path of several parts",
        "services/common/authz.py",
        'spiffe_id.rpartition("/")[0] == pattern[:-2]',
        "spiffe_id.startswith(pattern[:-1])",
        ("tests/security/test_authz.py::test_a_star_stands_for_the_last_part_of_an_identity",),
    ),
    Mutant(
        "a recipient that is no key is told as a row that was changed",
        _KV + "lease.py",
        "            failure, kind = _not_a_recipient(grant.key_id), audit_pb2.AUDIT_EVENT_TYPE_RELEASED\n",
        "            failure = _not_a_recipient(grant.key_id)\n",
        (_ATTACKS + "test_a_recipient_that_is_no_public_key",),
    ),
    Mutant(
        "ends that are owed are kept without bound",
        _KV + "custody.py",
        "                if len(system.state.owed) >= _MOST_OWED:\n",
        "                if False:\n",
        (_ATTACKS + "test_ends_that_are_owed_are_not_kept_without_bound",),
    ),
)
