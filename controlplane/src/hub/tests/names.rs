//! Flows that rest on a name: what the dataplane is told of them, and what is told of those it refused.

use super::*;

/// Says that a flow was refused for its name.
fn refuse(dp: &FakeDataplane, flow_id: u64, spoken: &str, text: String) {
    dp.say(Message::FlowClosed(v1::FlowClosed {
        flow_id,
        end: v1::FlowEnd::NameRefused.into(),
        refusal: Some(v1::NameRefusal {
            word: "name_mismatch".to_owned(),
            text,
            spoken: spoken.to_owned(),
            wanted: vec!["a.test".to_owned()],
        }),
        ..Default::default()
    }));
}

/// The events of a kind since the last call.
fn events(watch: &mut crate::watch::Watch<v1::Event>, kind: v1::EventKind) -> Vec<v1::Event> {
    let mut events = Vec::new();
    while let Some(Next::Change(event)) = watch.try_next() {
        if event.kind() == kind {
            events.push(event);
        }
    }
    events
}

#[test]
fn a_flow_refused_for_its_name_is_told_as_a_denial_with_both_names_and_its_watchers_hear_how_it_ended() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(Default::default()).unwrap();
    let mut flows = rig.hub.watch_flows(None).unwrap();
    let flow_id = open_allowed(&mut dp, WEB);
    refuse(
        &dp,
        flow_id,
        "evil.test",
        "TLS names evil.test at port 443, which the rule or grant does not name".to_owned(),
    );
    let denied = events(&mut watch, v1::EventKind::FlowDenied);
    assert_eq!(denied.len(), 1);
    assert_eq!(
        (denied[0].action(), denied[0].spoken_name.as_str()),
        (v1::Action::Deny, "evil.test")
    );
    assert_eq!(
        denied[0].text,
        "tcp 192.0.2.7:443: TLS names evil.test at port 443, which the rule or grant does not name; it rests \
         on a.test"
    );
    let reason = denied[0].reason.clone().unwrap();
    assert_eq!(
        (reason.step.as_str(), reason.subject.as_str()),
        ("name", "name_mismatch")
    );
    let mut ended = Vec::new();
    while let Some(Next::Change(change)) = flows.try_next() {
        if change.change() == v1::FlowChange::Removed {
            ended.push(change.flow.unwrap().ended);
        }
    }
    assert_eq!(ended, ["was refused for its name"]);
    assert_eq!(rig.metrics.names_refused.get(), 1);
    assert!(rig.hub.flows(Which::default()).is_empty());
}

#[test]
fn a_flow_that_might_have_spoken_a_name_that_is_no_longer_allowed_is_cut() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let allow = |name: &str| {
        let made = grant(GrantAction::Allow, name, None, Lifetime::Forever);
        rig.hub.create_grant(made).unwrap().0.id
    };
    let _first = allow("domain a.test");
    let second = allow("domain b.test");
    dp.told();
    let (shared, alone) = (flow(WEB, &["a.test", "b.test"]), flow(WEB, &["a.test"]));
    let verdict = dp.verdict(shared.clone());
    assert_eq!(verdict.names.len(), 2, "{verdict:?}");
    let cut = dp.open_by(&shared, &verdict);
    let verdict = dp.verdict(alone.clone());
    assert_eq!(verdict.names, ["a.test"]);
    dp.open_by(&alone, &verdict);
    dp.told();
    rig.hub.revoke_grant(&second, "tester").unwrap();
    assert_eq!(cuts(&dp.told()), [cut], "it may have spoken b.test");
}

#[test]
fn a_flow_that_was_never_listened_to_is_cut_when_a_name_is_demanded() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let subject = flow(WEB, &["a.test"]);
    let verdict = dp.verdict(subject.clone());
    assert!(verdict.names.is_empty());
    let unheard = dp.open_by(&subject, &verdict);
    dp.told();
    rig.apply("rules: [{action: allow, domains: [a.test]}]\n");
    assert_eq!(cuts(&dp.told()), [unheard]);
    let verdict = dp.verdict(subject.clone());
    assert_eq!(verdict.names, ["a.test"]);
    let heard = dp.open_by(&subject, &verdict);
    for rules in [
        "[{action: allow, domains: [a.test, b.test]}]",
        "[{action: allow, domains: [a.test], sni: off}]",
    ] {
        rig.apply(&format!("rules: {rules}\n"));
        assert!(!cuts(&dp.told()).contains(&heard), "{rules}");
    }
}

#[test]
fn a_guest_that_is_refused_again_and_again_makes_one_event_and_a_count() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(Default::default()).unwrap();
    for number in 0..50 {
        let flow_id = open_allowed(&mut dp, WEB);
        refuse(&dp, flow_id, &format!("n{number}.test"), "no".to_owned());
    }
    assert_eq!(events(&mut watch, v1::EventKind::FlowDenied).len(), 1);
    rig.pass(Duration::from_secs(61));
    let later = events(&mut watch, v1::EventKind::FlowDenied);
    assert_eq!(later.iter().map(|e| e.count).collect::<Vec<_>>(), [49]);
}

#[test]
fn what_a_dataplane_says_of_a_refusal_is_cut_to_size_and_only_names_are_taken_for_names() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(Default::default()).unwrap();
    let flow_id = open_allowed(&mut dp, WEB);
    refuse(&dp, flow_id, "not a name\n", "x".repeat(1 << 20));
    let denied = events(&mut watch, v1::EventKind::FlowDenied);
    assert_eq!(denied[0].spoken_name, "");
    assert!(denied[0].text.len() < 600, "{}", denied[0].text.len());
}

#[test]
fn the_guards_of_names_reach_the_dataplane_when_they_change() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    dp.told();
    rig.apply("version: 1\nguards: {ech: outer, quic: deny}\n");
    let settings: Vec<_> = dp
        .told()
        .into_iter()
        .filter_map(|told| match told {
            Told::VmSettings(settings) => Some((settings.ech_outer, settings.quic_denied)),
            _ => None,
        })
        .collect();
    assert_eq!(settings, [(true, true)]);
}

#[test]
fn a_yes_to_a_lookup_demands_of_the_connection_that_it_names_what_was_looked_up() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    dp.announce(MissId(1), 1, lookup("a.test", 1));
    let id = rig.hub.pending(Which::default())[0].id.clone();
    rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    dp.told();
    let verdict = dp.verdict(flow(WEB, &["a.test", "b.test"]));
    assert_eq!(
        (verdict.action, verdict.names.as_slice()),
        (ALLOW, &["a.test".to_owned()][..])
    );
    assert_eq!(verdict.name_demand, v1::NameDemand::ByPort as i32);
    // To the connection itself, by its name, likewise.
    dp.announce(MissId(2), 1, flow("192.0.2.9:443", &["c.test"]));
    let id = rig.hub.pending(Which::default())[0].id.clone();
    rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    let told = dp.told();
    let verdict = verdicts(&told).pop().unwrap();
    assert_eq!(
        (verdict.action, verdict.names.as_slice()),
        (ALLOW, &["c.test".to_owned()][..])
    );
    assert_eq!(verdict.name_demand, v1::NameDemand::ByPort as i32);
}

#[test]
fn an_alias_is_no_event_and_no_request_and_what_it_refuses_is_one_of_the_name_that_was_asked_for() {
    let rig = Rig::secure();
    rig.apply("version: 1\nmode: ask\ndns: {blockedDomains: [\"*.evil.test\"]}\n");
    let mut dp = rig.dataplane("web");
    dp.told();
    let (mut watch, _) = rig.hub.watch_events(Default::default()).unwrap();
    let matched = |verdict: &v1::Verdict| match verdict.r#match.clone().unwrap() {
        v1::verdict::Match::Lookup(names) => (names.kind(), names.name, names.alias),
        v1::verdict::Match::Flow(flow) => panic!("{flow:?}"),
    };
    let passed = dp.verdict(alias("cdn.example"));
    assert_eq!(passed.action(), v1::Action::Allow);
    let (kind, name, is_alias) = matched(&passed);
    assert_eq!(
        (kind, name.as_str(), is_alias),
        (v1::lookup_match::Kind::Subdomains, "example", true)
    );
    let refused = dp.verdict(alias("a.evil.test"));
    assert_eq!(refused.action(), v1::Action::Deny);
    assert!(matched(&refused).2);
    let mut all = Vec::new();
    while let Some(Next::Change(event)) = watch.try_next() {
        all.push(event);
    }
    assert_eq!(all, [], "nothing is told of an alias");
    assert!(rig.hub.denied(Which::default()).is_empty());

    dp.say(Message::Decided(v1::Decided {
        vm: 1,
        subject: Some(v1::decided::Subject::Lookup(v1::LookupSubject {
            name: "www.test".to_owned(),
            query_type: 1,
            alias: false,
        })),
        action: v1::Action::Deny.into(),
        reason: refused.reason.clone(),
        count: 1,
        would_deny: false,
    }));
    let denied = events(&mut watch, v1::EventKind::DnsDenied);
    assert_eq!(denied.len(), 1);
    let listed = rig.hub.denied(Which::default());
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].name, "www.test");
    assert_eq!(listed[0].reason.as_ref().unwrap().subject, "dns.blockedDomains");
}

#[test]
fn an_alias_uses_no_grant_that_lets_it_pass() {
    let rig = Rig::open();
    rig.apply("version: 1\n");
    let mut dp = rig.dataplane("web");
    let made = grant(GrantAction::Allow, "domain dns.google", None, Lifetime::Once);
    rig.hub.create_grant(made).unwrap();
    dp.told();
    for _ in 0..2 {
        let passed = dp.verdict(alias("dns.google"));
        assert_eq!((passed.action(), passed.once), (v1::Action::Allow, true));
        assert_eq!(passed.grant_id, "");
    }
    let grants = rig.hub.grants("web", "").unwrap();
    assert_eq!(grants[0].hits, 0);
    rig.hub.revoke_grant(&grants[0].id, "tester").unwrap();
    let refused = dp.verdict(alias("dns.google"));
    assert_eq!(refused.action(), v1::Action::Deny, "nothing names it any more");
}
