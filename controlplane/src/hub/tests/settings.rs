//! What a policy says beside its rules, as dataplanes are told it and people meet it.

use super::*;
use crate::approval::Scope;
use crate::policy::QUERIES_PER_MINUTE;

fn last_settings(told: &[Told]) -> v1::VmSettings {
    let of = |t: &Told| match t {
        Told::VmSettings(settings) => Some(settings.clone()),
        _ => None,
    };
    told.iter().rev().find_map(of).expect("settings")
}

#[test]
fn a_dataplane_is_told_how_lookups_are_treated_when_that_changes() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    rig.apply("version: 1\ndns: {ttl: {min: 5s, max: 60}, denyWith: {code: nxdomain, text: no}}\nguards: {dns: redirect}\nonControllerLoss: 10m\n");
    let settings = last_settings(&dp.told());
    let dns = settings.dns.unwrap();
    assert_eq!(
        (dns.ttl_min.unwrap().seconds, dns.ttl_max.unwrap().seconds),
        (5, 60)
    );
    assert_eq!(
        (dns.deny_with(), dns.deny_text.as_str()),
        (v1::DnsDenial::Nxdomain, "no")
    );
    assert!(dns.redirect && dns.queries_per_minute == QUERIES_PER_MINUTE);
    assert_eq!(
        settings.loss_grace.unwrap().seconds,
        540,
        "beyond the lease of a minute"
    );
    rig.apply("version: 1\nguards: {dns: off}\n");
    let settings = last_settings(&dp.told());
    assert!(!settings.dns.unwrap().redirect && settings.loss_grace.is_none());
}

#[test]
fn a_profile_of_some_vms_is_in_force_for_them() {
    let rig = Rig::open();
    rig.apply("version: 1\ndefaultAction: allow\nprofiles:\n  - vm: {name: db}\n    mode: block\n");
    let _dp = rig.dataplane_with(hello(1, vec![vm_up(1, "web"), vm_up(2, "db")]));
    assert_eq!(rig.hub.vm("web").unwrap().mode, v1::Mode::Enforce as i32);
    assert_eq!(rig.hub.vm("db").unwrap().mode, v1::Mode::Block as i32);
}

#[test]
fn a_limit_that_refused_lookups_is_an_event_and_repeats_are_counted() {
    let rig = Rig::open();
    let dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let reached = |count| {
        dp.say(Message::LimitReached(v1::LimitReached {
            vm: 1,
            limit: "dns.limits.namesPerDomain".to_owned(),
            subject: "example.com".to_owned(),
            value: 300,
            count,
        }));
    };
    reached(980);
    reached(20);
    let mut events = Vec::new();
    while let Some(Next::Change(event)) = watch.try_next() {
        events.push(event);
    }
    assert_eq!(events.len(), 1, "{events:?}");
    let event = &events[0];
    assert_eq!(
        (event.kind(), event.vm.as_str(), event.count),
        (v1::EventKind::LimitReached, "web", 980)
    );
    assert_eq!(
        event.text,
        "dns.limits.namesPerDomain (300) is reached for example.com: what is beyond it is refused"
    );
    assert_eq!(
        (event.names.as_slice(), event.action()),
        (&["example.com".to_owned()][..], v1::Action::Deny)
    );
}

#[test]
fn what_is_asked_is_bounded_as_the_policy_says() {
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\napprovals: {maxPendingPerVm: 3, maxRequestsPerMinute: 2}\n");
    let mut dp = rig.dataplane("web");
    dp.held(flow("192.0.2.7:1", &[]));
    dp.held(flow("192.0.2.7:2", &[]));
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let refused = dp.verdict(flow("192.0.2.7:3", &[]));
    let told = std::iter::from_fn(|| watch.try_next()).find_map(|next| match next {
        Next::Change(event) if event.kind() == v1::EventKind::LimitReached => Some(event.text),
        _ => None,
    });
    let told = told.unwrap_or_default();
    assert!(
        told.starts_with("tcp 192.0.2.7:3: ") && told.contains("approvals.maxRequestsPerMinute"),
        "{told}"
    );
    let reason = refused.reason.clone().unwrap();
    assert_eq!(
        (refused.action, refused.once, reason.step.as_str()),
        (DENY, true, "limit")
    );
    assert!(
        reason.text.contains("approvals.maxRequestsPerMinute"),
        "{}",
        reason.text
    );
    rig.pass(Duration::from_secs(61));
    dp.held(flow("192.0.2.7:3", &[]));
    dp.miss(flow("192.0.2.7:3", &[]));
    rig.pass(Duration::from_secs(61));
    let refused = dp.verdict(flow("192.0.2.7:4", &[]));
    let text = refused.reason.unwrap().text;
    assert!(text.contains("approvals.maxPendingPerVm"), "{text}");
}

#[test]
fn a_yes_beyond_what_the_policy_allows_is_refused_with_the_key_and_a_no_is_not() {
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\napprovals: {maxLifetime: 1h, maxScope: port}\n");
    let mut dp = rig.dataplane("web");
    let (_, id) = dp.held(flow(WEB, &["a.test"]));
    let refusal = |lifetime, scope| {
        let mut yes = reply(&id, Answer::Approve);
        (yes.lifetime, yes.scope) = (lifetime, scope);
        rig.hub.reply(&yes).unwrap_err().to_string()
    };
    for lifetime in [
        Lifetime::Forever,
        Lifetime::UntilVmStops,
        Lifetime::For(Duration::from_secs(3_601)),
    ] {
        let text = refusal(Some(lifetime), None);
        assert!(
            text.starts_with("approvals.maxLifetime of policy default is 1h for VM web"),
            "{text}"
        );
    }
    for scope in [Scope::Host, Scope::Name] {
        let text = refusal(Some(Lifetime::Once), Some(scope));
        assert!(
            text.starts_with("approvals.maxScope of policy default is port for VM web"),
            "{text}"
        );
    }
    let made = |target: &str| {
        rig.hub
            .create_grant(grant(GrantAction::Allow, target, Some("web"), Lifetime::Once))
    };
    for target in [
        "tcp 10.0.0.0/8:443",
        "tcp 192.0.2.7",
        "any 192.0.2.7",
        "domain a.test",
        "domain *.a.test:443",
    ] {
        assert!(
            made(target)
                .unwrap_err()
                .to_string()
                .contains("approvals.maxScope"),
            "{target}"
        );
    }
    for target in [
        "tcp 192.0.2.7:443",
        "icmp 192.0.2.7",
        "domain a.test:443",
        "lookup a.test",
    ] {
        made(target).unwrap();
    }
    assert_eq!(
        rig.hub.pending(Which::default()).len(),
        0,
        "the grant for its name and port answered it"
    );
    let (_, id) = dp.held(flow("192.0.2.8:443", &[]));
    let (_, granted, _, _) = rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    let expires = granted.lifetime.unwrap().kind.unwrap();
    assert!(
        matches!(expires, v1::lifetime::Kind::Duration(d) if d.seconds == 3_600),
        "{expires:?}"
    );
    let mut no = grant(
        GrantAction::Deny,
        "any 10.0.0.0/8",
        Some("web"),
        Lifetime::Forever,
    );
    no.reason = "never";
    rig.hub.create_grant(no).unwrap();
}

#[test]
fn dns_to_another_server_is_asked_about_by_its_address_and_port_alone() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (_, id) = dp.held(flow("1.1.1.1:853", &["one.one.one.one"]));
    let request = rig.hub.pending_request(&id).unwrap();
    assert_eq!(request.scopes.len(), 1, "{:?}", request.scopes);
    let reason = request.reason.unwrap();
    assert_eq!((reason.step.as_str(), reason.subject.as_str()), ("guard", "dns"));
    rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    assert_eq!(
        dp.verdict(flow("1.1.1.1:853", &["one.one.one.one"])).action,
        ALLOW
    );
    let (_, other) = dp.held(lookup("dns.google", 1));
    assert_eq!(rig.hub.pending_request(&other).unwrap().scopes.len(), 1);
}

#[test]
fn a_stored_policy_that_fails_its_own_tests_blocks_the_vms_under_it_until_another_is_applied() {
    let dir = TempDir::new();
    let location = Location::Sqlite(dir.path().join("state.db"));
    let stored = |document: &str| v1::Policy {
        name: "default".to_owned(),
        revision: 1,
        document: document.to_owned(),
        applied_at: Some(std::time::SystemTime::now().into()),
        ..Default::default()
    };
    let passes = "version: 1\ndefaultAction: allow\ntests: [{allow: \"tcp 192.0.2.7:443\"}]\n";
    let fails = "version: 1\ndefaultAction: allow\ntests: [{deny: \"tcp 192.0.2.7:443\"}]\n";
    let mut store = crate::store::open(&location).unwrap();
    store
        .apply(&[crate::store::Write::PutPolicy(stored(passes))])
        .unwrap();
    drop(store);
    let rig = Rig::start(&location, false);
    assert_eq!(rig.dataplane("web").verdict(flow(WEB, &[])).action, ALLOW);
    drop(rig);

    let dir = TempDir::new();
    let location = Location::Sqlite(dir.path().join("state.db"));
    let mut store = crate::store::open(&location).unwrap();
    store
        .apply(&[crate::store::Write::PutPolicy(stored(fails))])
        .unwrap();
    drop(store);
    let rig = Rig::start(&location, false);
    let mut dp = rig.dataplane("web");
    let verdict = dp.verdict(flow(WEB, &[]));
    assert_eq!(
        (verdict.action, verdict.reason.unwrap().step.as_str()),
        (DENY, "mode")
    );
    rig.apply(passes);
    dp.told();
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
}

#[test]
fn what_lies_below_a_public_suffix_is_wider_than_subdomains() {
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\napprovals: {maxScope: subdomains}\n");
    let _dp = rig.dataplane("web");
    let made = |target: &str| {
        rig.hub
            .create_grant(grant(GrantAction::Allow, target, Some("web"), Lifetime::Once))
    };
    for target in [
        "domain *.com",
        "domain *.co.uk:443",
        "domain *.github.io",
        "lookup *.com",
    ] {
        let text = made(target).unwrap_err().to_string();
        assert!(
            text.starts_with("approvals.maxScope of policy default is subdomains for VM web"),
            "{target}: {text}"
        );
    }
    for target in [
        "domain *.example.com",
        "domain *.a.github.io",
        "domain *.b.a.example.co.uk:443",
    ] {
        made(target).unwrap();
    }
}
