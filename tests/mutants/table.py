"""The protections, how each is removed, and the test that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One removal: in `file`, `old` becomes `new`; `tests` must then fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_KV = "services/keyvault/"
_SEC = "tests/security/"

_OR = "services/orchestrator/"
_FENCE = _SEC + "test_fence.py::test_paused_attempt_changes_nothing_after_its_turn"
_GUARD = "AND fence = %(fence)s AND state = 'RUNNING'"

MUTANTS = (
    Mutant(
        "the envelope is not bound to its provider",
        _KV + "envelope.py",
        "            self.provider,\n",
        "            '',\n",
        (_SEC + "test_envelope.py::test_every_part_of_the_context_is_bound",),
    ),
    Mutant(
        "the envelope is bound to nothing",
        _KV + "envelope.py",
        "        return fields(\n            MAGIC,",
        '        return b""\n        return fields(\n            MAGIC,',
        (_SEC + "test_rows.py::test_swap_rows",),
    ),
    Mutant(
        "one data key and nonce for all",
        _KV + "envelope.py",
        "nonce = os.urandom(_NONCE)",
        "nonce = os.urandom(1) * _NONCE",
        (_SEC + "test_envelope.py::test_one_dek_per_version",),
    ),
    Mutant(
        "no key commitment",
        _KV + "envelope.py",
        "if not hmac.compare_digest(envelope[len(MAGIC) : len(MAGIC) + _COMMITMENT], commitment):",
        "if False:",
        (_SEC + "test_envelope.py::test_salamander",),
    ),
    Mutant(
        "golden envelopes: another label",
        _KV + "envelope.py",
        'b"byokeep/envelope/v1"',
        'b"byokeep/envelope/v2"',
        (_SEC + "test_envelope.py::test_vectors_golden_envelopes",),
    ),
    Mutant(
        "malformed envelopes raise whatever comes",
        _KV + "envelope.py",
        '        raise EnvelopeError("not an envelope of version 1")',
        '        raise ValueError("not an envelope of version 1")',
        (_SEC + "test_envelope.py::test_fuzz_envelope_random",),
    ),
    Mutant(
        "the KEK is asked before the header is checked",
        _KV + "leasing.py",
        "            check_header(locked.envelope)\n",
        "",
        (_SEC + "test_envelope.py::test_fuzz_envelope_no_kek_call_before_the_header",),
    ),
    Mutant(
        "state MAC not checked",
        _KV + "domain.py",
        "    if not hmac.compare_digest(version.state_mac,",
        "    if False and not hmac.compare_digest(version.state_mac,",
        (_SEC + "test_rows.py::test_rollback_row_state_set_by_sql",),
    ),
    Mutant(
        "reconcile freezes nothing",
        _KV + "reconcile.py",
        "            followed.frozen.add((key_id, version))\n"
        "            await self._record(tenant, key_id, version)",
        "            pass",
        (_SEC + "test_rows.py::test_rollback_row_restored_whole",),
    ),
    Mutant(
        "the anchor is always believed",
        _KV + "anchor.py",
        "        anchored = self._read()\n",
        "        return True\n",
        (_SEC + "test_rows.py::test_rollback_row_whole_database",),
    ),
    Mutant(
        "a lost anchor is forgiven",
        _KV + "anchor.py",
        "            return size == 0\n",
        "            return True\n",
        (_SEC + "test_rows.py::test_a_lost_anchor_is_not_forgotten",),
    ),
    Mutant(
        "listing asks the KEK backend",
        _KV + "custody.py",
        "        return await store.page(",
        "        await self._backend.healthy()\n        return await store.page(",
        (_SEC + "test_rows.py::test_list_without_vault",),
    ),
    Mutant(
        "grants: signature not verified",
        "clients/python/src/byokeep/dsse.py",
        "    except InvalidSignature:\n        raise",
        "    except InvalidSignature:\n        return envelope.payload\n        raise",
        (_SEC + "test_grants.py::test_grant_mutation_unsigned",),
    ),
    Mutant(
        "grants: any payload type",
        "clients/python/src/byokeep/dsse.py",
        "    if envelope.payload_type != payload_type:",
        "    payload_type = envelope.payload_type\n    if False:",
        (_SEC + "test_grants.py::test_grant_mutation_signers",),
    ),
    Mutant(
        "grants: any deployment",
        _KV + "grants.py",
        "if grant.deployment != deployment:",
        "if False:",
        (_SEC + "test_grants.py::test_grant_mutation_signed",),
    ),
    Mutant(
        "grants: any provider and owner",
        _KV + "leasing.py",
        "        if (provider_value(key.provider), key.owner) != (grant.provider, grant.owner):",
        "        if False:",
        (_SEC + "test_grants.py::test_grant_mutation_signed",),
    ),
    Mutant(
        "grants: an hour of life",
        _KV + "grants.py",
        "MAX_LIFE = datetime.timedelta(seconds=60)",
        "MAX_LIFE = datetime.timedelta(hours=1)",
        (_SEC + "test_grants.py::test_grant_mutation_times",),
    ),
    Mutant(
        "grants: time not checked",
        _KV + "leasing.py",
        "            check_time(grant, head.now)\n",
        "",
        (_SEC + "test_grants.py::test_grant_mutation_times",),
    ),
    Mutant(
        "grants: no tolerance for clocks",
        _KV + "grants.py",
        "SKEW = datetime.timedelta(seconds=5)",
        "SKEW = datetime.timedelta(seconds=0)",
        (_SEC + "test_grants.py::test_grant_mutation_within_the_skew",),
    ),
    Mutant(
        "grants: the reason is not recorded",
        _KV + "leasing.py",
        '        self._denied(holder, "/byokeep',
        '        _ = (holder, "/byokeep',
        (_SEC + "test_grants.py::test_grant_mutation_is_on_the_record",),
    ),
    Mutant(
        "grants: redeemed as often as one likes",
        _KV + "leasing.py",
        "                grant.grant_id,\n                grant.tenant,",
        '                new_id("gra"),\n                grant.tenant,',
        (
            _SEC + "test_grants.py::test_grant_race",
            _SEC + "test_grants.py::test_grant_race_with_a_restart",
        ),
    ),
    Mutant(
        "grants: any runner class",
        _KV + "grants.py",
        '    if spiffe_id.rpartition("/")[2] != grant.runner_class:',
        "    if False:",
        (_SEC + "test_grants.py::test_confused_deputy_outside_the_runner_class",),
    ),
    Mutant(
        "grants: any public key",
        _KV + "grants.py",
        "    if not hmac.compare_digest(digest, grant.recipient_key_sha256):",
        "    if False:",
        (_SEC + "test_grants.py::test_confused_deputy_substituted_public_key",),
    ),
    Mutant(
        "no cap on leases in flight",
        _KV + "store/leases.py",
        "AND end_time IS NULL AND expire_time > now()) < %(cap)s",
        "AND end_time IS NULL AND expire_time > now()) < %(cap)s + 1000",
        (_SEC + "test_grants.py::test_rogue_orchestrator_in_flight_cap",),
    ),
    Mutant(
        "the version is not locked with the chain",
        _KV + "store/leases.py",
        "FOR UPDATE OF c, v",
        "FOR UPDATE OF c",
        (_SEC + "test_grants.py::test_a_revocation_that_commits_first_wins",),
    ),
    Mutant(
        "caller classes not checked",
        "services/common/authz.py",
        "    if not caller.classes.intersection(access.callers):",
        "    if False:",
        (_SEC + "test_authz.py::test_authz_matrix_on_the_wire",),
    ),
    Mutant(
        "undeclared methods are served",
        "services/common/authz.py",
        "    if not access.callers or options_pb2",
        "    if False and options_pb2",
        (_SEC + "test_authz.py::test_authz_matrix_undeclared_stops_the_start",),
    ),
    Mutant(
        "any trust domain",
        "services/common/authz.py",
        "        if match and match[1] == self._trust_domain:\n            caller = Caller(spiffe_id, self._classes_of(spiffe_id))",
        '        if match:\n            own = f"spiffe://{self._trust_domain}{match[2]}"\n'
        "            caller = Caller(spiffe_id, self._classes_of(own))",
        (_SEC + "test_authz.py::test_svid_shape",),
    ),
    Mutant(
        "the seal is not bound to the tenant",
        "clients/python/src/byokeep/sealing.py",
        "            self.tenant,\n",
        "            '',\n",
        (_SEC + "test_intake.py::test_intake_replay",),
    ),
    Mutant(
        "the seal is not bound to the request",
        "clients/python/src/byokeep/sealing.py",
        "            self.request_id,\n        )",
        "            '',\n        )",
        (_SEC + "test_intake.py::test_intake_replay",),
    ),
    Mutant(
        "intake keys live on",
        _KV + "store/intake.py",
        "WHERE key_id = %s AND not_after + interval '5 minutes' > now()",
        "WHERE key_id = %s",
        (_SEC + "test_intake.py::test_intake_replay_of_a_closed_window",),
    ),
    Mutant(
        "epoch KEKs are not destroyed",
        _KV + "epochs.py",
        "        await backend.destroy(one.name)\n",
        "",
        (_SEC + "test_intake.py::test_intake_replay_of_a_closed_epoch",),
    ),
    Mutant(
        "intake is not counted",
        _KV + "custody.py",
        "            raise _limit(self._intake_per_hour)",
        "            pass",
        (_SEC + "test_intake.py::test_intake_oracle",),
    ),
    Mutant(
        "keyvault does not check a key's form",
        _KV + "intake_child.py",
        '        check_key(order["provider"], key)',
        "        pass",
        (_SEC + "test_intake.py::test_key_charset",),
    ),
    Mutant(
        "hints of short keys show the last four",
        _KV + "hint.py",
        "key[-4:] if len(key) >= 24 else ''",
        "key[-4:]",
        (_SEC + "test_intake.py::test_key_charset_hint",),
    ),
    Mutant(
        "starts with gRPC tracing",
        "services/common/config.py",
        '    if environ.get("GRPC_TRACE"):',
        "    if False:",
        (_SEC + "test_leaks.py::test_env_guard",),
    ),
    Mutant(
        "unforeseen errors are sent as they are",
        "services/common/interceptor.py",
        "            return internal()",
        "            return ByokeepError(grpc.StatusCode.INTERNAL, 'INTERNAL', str(error))",
        (_SEC + "test_leaks.py::test_error_text",),
    ),
    Mutant(
        "exception texts are logged",
        "services/common/logs.py",
        '        "error": f"{type(error).__module__}.{type(error).__qualname__}",',
        '        "error": repr(error),',
        (_SEC + "test_leaks.py::test_error_text",),
    ),
    Mutant(
        "libraries' log arguments are shown",
        "services/common/logs.py",
        '            "event": record.msg if isinstance(record.msg, str) else type(record.msg).__name__,',
        '            "event": record.getMessage(),',
        (_SEC + "test_leaks.py::test_error_text_of_libraries",),
    ),
    Mutant(
        "a lease without its audit event",
        _KV + "store/leases.py",
        "    SELECT %(chain)s, %(sequence)s, %(key_id)s, %(body)s, %(previous)s, %(hash)s FROM redeemed\n",
        "    SELECT %(chain)s, %(sequence)s, %(key_id)s, %(body)s, %(previous)s, %(hash)s"
        " FROM redeemed WHERE false\n",
        (_SEC + "test_leaks.py::test_audit_fail_closed",),
    ),
    Mutant(
        "each denial is an event of its own",
        _KV + "denials.py",
        "        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:",
        "        if False:",
        (_SEC + "test_leaks.py::test_denial_flood",),
    ),
    Mutant(
        "a call of a fenced attempt is stored",
        _OR + "sql.py",
        "WHERE attempt.id = %(id)s AND fence = %(fence)s AND attempt.state = 'RUNNING'\n"
        "        FOR UPDATE OF attempt)",
        "WHERE attempt.id = %(id)s AND %(fence)s > 0 FOR UPDATE OF attempt)",
        (_FENCE,),
    ),
    Mutant(
        "a chunk of a fenced attempt is stored",
        _OR + "sql.py",
        "WHERE id = %(id)s " + _GUARD + " FOR UPDATE",
        "WHERE id = %(id)s AND %(fence)s > 0 FOR UPDATE",
        (_FENCE,),
    ),
    Mutant(
        "a fenced attempt ends its review",
        _OR + "sql.py",
        "WHERE id = %(id)s " + _GUARD + "\n        RETURNING *)",
        "WHERE id = %(id)s AND %(fence)s > 0\n        RETURNING *)",
        (_FENCE,),
    ),
    Mutant(
        "a lost call is repeated",
        _OR + "sweeper.py",
        "ambiguous=stale.unfinished_call)",
        "ambiguous=False)",
        (_SEC + "test_fence.py::test_call_under_way_is_not_repeated_when_its_worker_falls_silent",),
    ),
    Mutant(
        "a living worker is fenced off",
        _OR + "sql.py",
        "AND a.heartbeat_time < now() - make_interval(secs => %(seconds)s)",
        "AND %(seconds)s > 0",
        (_SEC + "test_fence.py::test_worker_that_lives_keeps_its_attempt",),
    ),
    Mutant(
        "submission without a transaction",
        _OR + "store_reviews.py",
        "self._database.transaction()",
        "self._database.statement()",
        (_SEC + "test_enqueue_atomic.py::test_submission_that_breaks_off_leaves_nothing",),
    ),
    Mutant(
        "validation scheduled without a transaction",
        _OR + "store_keys.py",
        "self._database.transaction()",
        "self._database.statement()",
        (_SEC + "test_enqueue_atomic.py::test_validation_that_breaks_off_leaves_no_job",),
    ),
    Mutant(
        "every submission is a new one",
        _OR + "reviews.py",
        "_scope(request), store_requests",
        "__import__('os').urandom(8).hex(), store_requests",
        (_SEC + "test_enqueue_atomic.py::test_repeated_submission_is_one_review",),
    ),
    Mutant(
        "any role will do",
        _OR + "access.py",
        "if not held.intersection(access.roles):",
        "if not held:",
        (_SEC + "test_tenant_authz.py::test_a_role_allows_what_it_is_for_and_no_more",),
    ),
    Mutant(
        "no role is asked for",
        _OR + "access.py",
        "if not held.intersection(access.roles):",
        "if False:",
        (_SEC + "test_tenant_authz.py::test_nobody_acts_for_a_tenant_that_did_not_allow_it",),
    ),
    Mutant(
        "anybody speaks for users",
        _OR + "access.py",
        "if user and not self.may_assert_users:",
        "if False:",
        (_SEC + "test_tenant_authz.py::test_user_is_asserted_only_by_who_may",),
    ),
    Mutant(
        "reviews are found whosever they are",
        _OR + "store_reviews.py",
        "WHERE id = %(id)s AND tenant = %(tenant)s",
        "WHERE id = %(id)s AND %(tenant)s <> ''",
        (_SEC + "test_tenant_authz.py::test_name_of_another_tenants_thing_finds_nothing",),
    ),
    Mutant(
        "a review takes anybody's key",
        _OR + "reviews.py",
        "[key for key in keys if key.owner == owner]",
        "keys",
        (_SEC + "test_tenant_authz.py::test_review_never_falls_back_to_the_key_of_another",),
    ),
    Mutant(
        "a column for token usage",
        _OR + "migrations/versions/0001_the_first_tables.py",
        'sa.Column("lease_id"',
        'sa.Column("prompt_tokens", sa.Integer()), sa.Column("lease_id"',
        (_SEC + "test_no_usage_schema.py",),
    ),
    Mutant(
        "a configuration at every handshake",
        "services/common/tls.py",
        "                if stamp == self._seen:\n                    return None\n",
        "",
        (_SEC + "test_connection_flood.py",),
    ),
    Mutant(
        "any public key in the intake table is signed",
        _KV + "intake.py",
        "        if key in self._verified:\n            return\n",
        "        return\n",
        (_SEC + "test_intake.py::test_intake_key_from_sql_is_not_signed",),
    ),
    Mutant(
        "the tenant's own intake cap",
        _KV + "custody.py",
        " or of_tenant > TENANT_FACTOR * self._intake_per_hour:",
        ":",
        (_SEC + "test_intake.py::test_intake_oracle_repeats_count",),
    ),
    Mutant(
        "chains are not held against the log",
        _KV + "reconcile.py",
        "        await self._check_log()\n",
        "",
        (_SEC + "test_rows.py::test_rollback_row_with_its_chain",),
    ),
    Mutant(
        "one bad row ends the pass",
        _KV + "background.py",
        "            await act(item)\n        except Exception as error:\n            failed = error",
        "            await act(item)\n        except KeyError as error:\n            failed = error",
        ("tests/unit/test_background.py",),
    ),
    Mutant(
        "an old anchor check will do",
        _KV + "anchor.py",
        "        if time.monotonic() - self._held > STALE_SECONDS:",
        "        if False:",
        (_SEC + "test_rows.py::test_a_check_that_no_longer_runs_stops_leases",),
    ),
    Mutant(
        "the intake child inherits the environment",
        _KV + "intake.py",
        '        env={"PYTHONPATH"',
        '        env={**os.environ, "PYTHONPATH"',
        (_SEC + "test_intake.py::test_the_intake_child_gets_no_environment",),
    ),
    Mutant(
        "the key in the outcome's log",
        "services/llm_runner/child.py",
        "        key = private.open(leased.sealed_key, lease_info(proceed.grant.payload, leased.lease_id))",
        "        key = private.open(leased.sealed_key, lease_info(proceed.grant.payload, leased.lease_id))"
        '\n        __import__("os").write(2, key)',
        (_SEC + "test_canary.py",),
    ),
    Mutant(
        "a config file in the working directory",
        "clients/python/src/byokeep/profile.py",
        "    checkout = Path(sys.prefix if prefix is None else prefix).parent.resolve()\n",
        "    for folder in (Path.cwd(), *Path.cwd().parents):\n"
        '        if (folder / ".byokeep" / "config.toml").is_file():\n'
        '            return folder / ".byokeep" / "config.toml"\n'
        "    checkout = Path(sys.prefix if prefix is None else prefix).parent.resolve()\n",
        ("tests/unit/test_profile.py::test_the_working_directory_brings_no_config",),
    ),
    Mutant(
        "logs of the stack that others may read",
        "deploy/local/processes.py",
        "    os.fchmod(descriptor, 0o600)",
        "    os.fchmod(descriptor, 0o644)",
        ("tests/component/test_local_stack.py::test_logs_are_closed_to_others",),
    ),
    Mutant(
        "an open call is given up with its stream",
        _OR + "execution.py",
        "and self._call_open and code in _LOST",
        "and False",
        (
            "tests/component/test_orchestrator_reviews.py"
            "::test_open_call_is_taken_up_again_where_the_stream_breaks",
        ),
    ),
    Mutant(
        "content is stored in clear",
        _OR + "content.py",
        "        return cls(tenant, epoch, AESGCM(material[:32]), material[32:])\n",
        '        clear = type("C", (), {"encrypt": lambda s, n, p, a: p + bytes(16),'
        ' "decrypt": lambda s, n, c, a: c[:-16]})\n'
        "        return cls(tenant, epoch, clear(), material[32:])\n",
        (_SEC + "test_content_at_rest.py",),
    ),
    Mutant(
        "content is not bound to its review",
        _OR + "content.py",
        "self.tenant, self.epoch, review_id, field)",
        "self.tenant, self.epoch, field)",
        ("tests/unit/test_content.py::test_moved_content_does_not_open",),
    ),
    Mutant(
        "content is not bound to its field",
        _OR + "content.py",
        "self.tenant, self.epoch, review_id, field)",
        "self.tenant, self.epoch, review_id)",
        ("tests/unit/test_content.py::test_moved_content_does_not_open",),
    ),
    Mutant(
        "content is not bound to its tenant",
        _OR + "content.py",
        "self.tenant, self.epoch, review_id, field)",
        "self.epoch, review_id, field)",
        ("tests/unit/test_content.py::test_moved_content_does_not_open",),
    ),
    Mutant(
        "content keys are remembered for ever",
        _OR + "content.py",
        "        if known is not None and known[0] > time.monotonic():",
        "        if known is not None:",
        ("tests/component/test_orchestrator_content.py::test_known_keys_are_forgotten",),
    ),
    Mutant(
        "any content key opens any content",
        _OR + "content.py",
        "hmac.compare_digest(commitment, self.commitment)",
        "commitment",
        ("tests/unit/test_content.py::test_every_altered_byte_is_noticed",),
    ),
    Mutant(
        "a past epoch's content key is made again",
        _KV + "content.py",
        "        if row is None and not epoch:",
        "        if row is None:",
        (_SEC + "test_content_keys.py::test_a_shredded_tenants_content_is_unreadable",),
    ),
    Mutant(
        "an ended epoch is served until somebody destroys it",
        _KV + "content.py",
        "        if self._over(wanted, now):",
        "        if False:",
        (
            _SEC + "test_content_keys.py::test_an_ended_epoch_is_refused_by_time_alone",
            _SEC + "test_content_at_rest.py::test_content_at_rest_after_its_epoch",
        ),
    ),
    Mutant(
        "ended epochs of content live on",
        _KV + "epochs.py",
        "        await backend.destroy(one.name)\n",
        "",
        (_SEC + "test_content_keys.py::test_an_ended_epoch_dies",),
    ),
    Mutant(
        "a content key is the data key itself",
        _KV + "content.py",
        "    return HKDF(SHA256(), 32, salt=None, info=info).derive(data_key)",
        "    return bytes(data_key)",
        (_SEC + "test_content_keys.py::test_what_is_handed_out_is_no_data_key",),
    ),
    Mutant(
        "content keys under the KEK of provider keys",
        _KV + "content.py",
        "kek.content_kek(epoch)",
        "kek.tenant_kek(tenant)",
        (
            _SEC + "test_content_keys.py::test_no_way_from_a_provider_key_to_a_content_key",
            _SEC + "test_content_keys.py::test_no_way_from_a_content_key_to_a_provider_key",
        ),
    ),
    Mutant(
        "a shredded tenant's content keys stay",
        _KV + "service/admin.py",
        "            await epoch_store.forget_tenant(connection, tenant)\n",
        "",
        (
            _SEC + "test_content_keys.py::test_a_shredded_tenants_content_is_unreadable",
            _SEC + "test_content_at_rest.py::test_content_of_a_shredded_tenant",
        ),
    ),
    Mutant(
        "the data role makes epochs",
        _KV + "content.py",
        "        try:\n            data_key = await backend.generate_data_key(name)",
        "        try:\n            await backend.create(name)\n"
        "            data_key = await backend.generate_data_key(name)",
        (_SEC + "test_content_keys.py::test_an_epoch_that_is_not_there",),
    ),
    Mutant(
        "KEKs that a restored database forgot live on",
        _KV + "epochs.py",
        '            await each("epoch_adopt", past, self._adopt)\n',
        "",
        (
            _SEC
            + "test_content_keys.py"
            + "::test_a_kek_that_an_older_database_does_not_know_dies_too",
        ),
    ),
    Mutant(
        "an intake KEK dies before its keys' windows",
        _KV + "epochs.py",
        "INTAKE.end(epoch) + MAX_WINDOW + INTAKE_GRACE",
        "INTAKE.end(epoch) + INTAKE_GRACE",
        (_SEC + "test_content_keys.py::test_no_statement_outlives_its_epoch",),
    ),
    Mutant(
        "calls are not counted against the day",
        _OR + "sql.py",
        "earlier + rate_bucket.events < ceiling",
        "earlier + rate_bucket.events > 0",
        ("tests/component/test_orchestrator_reviews.py::test_no_call_above_the_days_ceiling",),
    ),
)
