//! What the history and watchers are told.

use super::*;

#[tokio::test]
async fn a_flow_that_is_announced_anew_is_told_as_such_and_is_no_other_in_the_history() {
    let rig = Rig::open();
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let vnet_proto::model::Subject::Flow(subject) = flow("192.0.2.7:22", &[]) else {
        unreachable!()
    };
    let live = v1::FlowOpened {
        flow_id: 1,
        vm: 1,
        subject: Some((&subject).into()),
        ..Default::default()
    };
    let mut dp = rig.dataplane_with(v1::Hello {
        live_flows: vec![live],
        ..hello(1, vec![vm_up(1, "web")])
    });
    dp.open(&flow("192.0.2.8:22", &[]), None, "");
    let opened: Vec<(bool, String)> = std::iter::from_fn(|| watch.try_next())
        .filter_map(|next| match next {
            Next::Change(event) if event.kind() == v1::EventKind::FlowOpened => {
                Some((event.announced, event.text))
            }
            _ => None,
        })
        .collect();
    assert_eq!(
        opened,
        [
            (true, "web still has open tcp 192.0.2.7:22".to_owned()),
            (false, "web opened tcp 192.0.2.8:22".to_owned())
        ]
    );
    let mut recalled = 0;
    let span = Span::default();
    rig.hub.recall(None, span, |_| recalled += 1).await.unwrap();
    assert_eq!(recalled, 1);
}

#[test]
fn what_a_cached_verdict_refused_is_told_of_its_own_target() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    rig.apply("mode: enforce\ndefaultAction: deny\ndns: {defaultAction: deny}\n");
    let refused = dp.verdict(flow("192.0.2.8:22", &[]));
    let name = dp.verdict(lookup("one.test", 1));
    for (verdict, subject) in [
        (&refused, flow("192.0.2.9:23", &[])),
        (&name, lookup("two.test", 28)),
    ] {
        let subject = match &subject {
            Subject::Flow(flow) => v1::decided::Subject::Flow(flow.into()),
            Subject::Lookup(lookup) => v1::decided::Subject::Lookup(lookup.into()),
        };
        dp.say(Message::Decided(v1::Decided {
            vm: 1,
            subject: Some(subject),
            action: verdict.action,
            reason: verdict.reason.clone(),
            count: 1,
            ..Default::default()
        }));
    }
    let texts: Vec<String> = std::iter::from_fn(|| watch.try_next())
        .filter_map(|next| match next {
            Next::Change(event) if !event.names.is_empty() || event.tuple.is_some() => {
                Some(event.text.clone())
            }
            _ => None,
        })
        .collect();
    let why = "nothing allows it, and the default action of policy default denies";
    assert_eq!(
        texts,
        [
            format!("tcp 192.0.2.8:22: {why}"),
            format!("lookup of one.test (A): {why}"),
            format!("tcp 192.0.2.9:23: {why}"),
            format!("lookup of two.test (AAAA): {why}"),
        ]
    );
}

#[tokio::test]
async fn t63_a_history_that_was_cut_off_says_so_and_no_number_means_two_events() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let location = Location::Sqlite(file.clone());
    let all = || EventQuery {
        oldest_first: true,
        limit: 1_000,
        ..Default::default()
    };
    let last = {
        let rig = Rig::start(&location, true);
        let _dp = rig.dataplane("web");
        rig.hub.watch_events(EventFilter::default()).unwrap().1
    };
    // Closed in order: nothing is said, and the numbers go on.
    let rig = Rig::start(&location, true);
    assert_eq!(rig.hub.watch_events(EventFilter::default()).unwrap().1, last);
    drop(rig);

    // Killed: its mark is still there.
    rusqlite::Connection::open(&file)
        .unwrap()
        .execute("INSERT INTO history_opened (one) VALUES (1)", [])
        .unwrap();
    let rig = Rig::start(&location, true);
    let (_watch, given) = rig.hub.watch_events(EventFilter::default()).unwrap();
    assert!(given > last + 1_000_000_000, "{last}, then {given}");
    rig.hub.tick();
    let kept = rig.hub.writer().events(all()).await.unwrap();
    let cut = kept.iter().filter(|e| e.kind() == v1::EventKind::HistoryCutOff);
    let cut: Vec<u64> = cut.map(|event| event.sequence).collect();
    assert_eq!(cut, [given]);
    drop(rig);
    // It is told once.
    let rig = Rig::start(&location, true);
    assert_eq!(rig.hub.watch_events(EventFilter::default()).unwrap().1, given);
}

#[test]
fn a_slow_watcher_gets_a_gap_and_the_hub_does_not_wait() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let misses = WATCH_QUEUE_MAX + 10;
    rig.apply("defaultAction: deny\n");
    dp.told();
    for n in 0..misses {
        let reset = v1::FlowOpened {
            flow_id: n as u64 + 1,
            vm: 1,
            subject: match flow(WEB, &[]) {
                Subject::Flow(flow) => Some((&flow).into()),
                Subject::Lookup(_) => None,
            },
            ..Default::default()
        };
        dp.say(Message::FlowOpened(reset));
        dp.told();
    }
    let mut seen = 0;
    let missed = loop {
        match watch.try_next() {
            Some(Next::Change(_)) => seen += 1,
            Some(Next::Gap(missed)) => break missed,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((seen, missed), (WATCH_QUEUE_MAX, 11), "one event is the policy's");
}

#[tokio::test]
async fn a_guest_that_is_denied_again_and_again_makes_few_events_and_hides_none() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    rig.apply("defaultAction: deny\n");
    dp.told();
    let (made, ..) = rig
        .hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.9:1",
            None,
            Lifetime::Forever,
        ))
        .unwrap();
    let attempts = 2 * repeats::KEYS_PER_VM_MAX;
    for n in 0..attempts {
        for _ in 0..3 {
            let to = format!("10.0.{}.{}:80", n / 256, n % 256);
            assert_eq!(dp.verdict(flow(&to, &[])).action, DENY);
        }
        dp.told();
    }
    assert_eq!(dp.verdict(lookup("example.com", 1)).action, ALLOW);
    rig.hub.bring_history_up_to_date();
    let all = crate::store::EventQuery {
        limit: 100_000,
        ..Default::default()
    };
    let events = rig.hub.writer().events(all).await.unwrap();
    let of = |kind: v1::EventKind| events.iter().filter(move |e| e.kind() == kind);
    let denied: Vec<_> = of(v1::EventKind::FlowDenied).collect();
    // Of each that has room: the first, and the two that followed; and twice for all others.
    assert_eq!(denied.len(), 2 * (repeats::KEYS_PER_VM_MAX + 1));
    let counted: u64 = denied.iter().map(|e| e.count.max(1)).sum();
    assert_eq!(counted, 3 * attempts as u64, "none is lost");
    assert_eq!(of(v1::EventKind::DnsAllowed).count(), 1);
    assert!(of(v1::EventKind::GrantCreated).any(|e| e.subject == made.id));
    let told = denied.len() as u64;
    assert_eq!(rig.metrics.events_counted.get(), 3 * attempts as u64 - told / 2);
}

#[test]
fn what_a_dataplane_counts_of_a_vm_is_shown_with_it() {
    let rig = Rig::open();
    let dp = rig.dataplane("web");
    let many = (0..10_000).map(|n| (format!("made_up_{n}"), n));
    dp.say(Message::VmStatus(v1::VmStatus {
        vm: 1,
        attached: true,
        dropped_frames: [("denied".to_owned(), 2)].into(),
        counters: [("dns_relayed".to_owned(), 5)].into(),
        ..Default::default()
    }));
    let vm = rig.hub.vm("web").unwrap();
    assert_eq!((vm.dropped_frames["denied"], vm.counters["dns_relayed"]), (2, 5));
    dp.say(Message::VmStatus(v1::VmStatus {
        vm: 1,
        attached: true,
        counters: many.collect(),
        ..Default::default()
    }));
    assert_eq!(rig.hub.vm("web").unwrap().counters.len(), 256, "no more are kept");
}

#[tokio::test]
async fn limits_that_a_vm_met_are_in_the_history_once_a_minute_with_their_count() {
    let rig = Rig::open();
    let dp = rig.dataplane("web");
    for refused in [1, 4, 40] {
        dp.say(Message::VmStatus(v1::VmStatus {
            vm: 1,
            attached: true,
            dropped_frames: [("flow_limit".to_owned(), refused), ("denied".to_owned(), 7)].into(),
            counters: [
                ("synthetic_exhausted".to_owned(), refused),
                ("dns_relayed".to_owned(), 7),
            ]
            .into(),
            ..Default::default()
        }));
    }
    rig.hub.bring_history_up_to_date();
    let all = crate::store::EventQuery {
        limit: 1_000,
        ..Default::default()
    };
    let events = rig.hub.writer().events(all).await.unwrap();
    let reached: Vec<_> = events
        .iter()
        .filter(|e| e.kind() == v1::EventKind::LimitReached)
        .map(|e| (e.vm.as_str(), e.text.contains("synthetic"), e.count))
        .collect();
    // Newest first: the 39 that followed in one, the first at once. Of either count.
    for synthetic in [false, true] {
        let of: Vec<u64> = reached
            .iter()
            .filter(|(vm, is, _)| *vm == "web" && *is == synthetic)
            .map(|(_, _, count)| *count)
            .collect();
        assert_eq!(of, [39, 0], "{reached:?}");
    }
    assert_eq!(reached.len(), 4);
}

#[test]
fn watches_begin_with_what_is_there() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    dp.held(flow(WEB, &[]));
    let mut watch = rig.hub.watch_pending(None).unwrap();
    let mut next = || match watch.try_next() {
        Some(Next::Change(change)) => change.change,
        other => panic!("{other:?}"),
    };
    assert_eq!(next(), v1::PendingChange::Added as i32);
    assert_eq!(next(), v1::PendingChange::Synced as i32);
    dp.held(flow("192.0.2.7:1", &[]));
    assert_eq!(next(), v1::PendingChange::Added as i32);
    let other = rig
        .hub
        .watch_pending(Some(VmSelector::named("other")))
        .unwrap()
        .try_next();
    assert!(matches!(other, Some(Next::Change(c)) if c.change == v1::PendingChange::Synced as i32));
}

#[test]
fn bindings_explain_and_denied_lookups_are_listed() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    rig.apply("defaultAction: deny\ndns:\n  allowedDomains: [good.test]\n");
    dp.told();
    dp.say(Message::Binding(v1::BindingLearned {
        vm: 1,
        name: "good.test".to_owned(),
        addresses: vec![vec![192, 0, 2, 7]],
        expires_in: Some(prost_types::Duration {
            seconds: 60,
            nanos: 0,
        }),
    }));
    let explained = rig
        .hub
        .explain("", &"tcp 192.0.2.7:443".parse().unwrap())
        .unwrap();
    assert_eq!(
        (explained.action, explained.names),
        (ALLOW, vec!["good.test".to_owned()])
    );
    let metadata = rig
        .hub
        .explain("web", &"tcp 169.254.169.254:80".parse().unwrap())
        .unwrap();
    assert_eq!(
        (metadata.action, metadata.guards),
        (DENY, vec![v1::Guard::Metadata as i32])
    );
    assert!(
        rig.hub
            .explain("web", &"tcp 10.0.0.0/8:80".parse().unwrap())
            .is_err()
    );
    assert_eq!(dp.verdict(lookup("bad.test", 1)).action, DENY);
    assert_eq!(dp.verdict(lookup("bad.test", 1)).action, DENY);
    let denied = rig.hub.denied(Which::default());
    assert_eq!(
        (denied.len(), denied[0].name.as_str(), denied[0].count),
        (1, "bad.test", 2)
    );
    assert_eq!(rig.hub.bindings(Which::default()).len(), 1);
    rig.pass(Duration::from_secs(60));
    assert_eq!(rig.hub.bindings(Which::default()).len(), 0);
}
