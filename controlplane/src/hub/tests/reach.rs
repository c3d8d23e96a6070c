//! What answers would cover, what parks, and what an answer that cuts says of it.

use vnet_proto::model::{FlowSubject, Guard, GuardSet, Subject};

use super::*;

/// What the scopes of a request cover: for each reach the scope, the VMs, and VMs, requests and names.
fn reaches(rig: &Rig, id: &str) -> Vec<(v1::Scope, String, [u32; 3])> {
    let (_, offers) = rig.hub.offers(id).unwrap();
    let options = offers.unwrap().into_messages();
    let reach = |option: &v1::ScopeOption| {
        let scope = option.scope();
        option.reaches.clone().into_iter().map(move |reach| {
            let vms = VmSelector::try_from(reach.vms.unwrap()).unwrap();
            (
                scope,
                vms.to_string(),
                [reach.vm_count, reach.requests, reach.names],
            )
        })
    };
    options.iter().flat_map(reach).collect()
}

fn labelled(handle: u32, name: &str, role: &str) -> v1::VmUp {
    v1::VmUp {
        labels: [("role".to_owned(), role.to_owned())].into(),
        ..vm_up(handle, name)
    }
}

fn learn(dp: &FakeDataplane, name: &str, address: [u8; 4]) {
    dp.say(Message::Binding(v1::BindingLearned {
        vm: 1,
        name: name.to_owned(),
        addresses: vec![address.to_vec()],
        expires_in: crate::convert::span(Duration::from_secs(300)),
    }));
}

#[test]
fn each_scope_says_how_many_vms_requests_and_names_a_yes_covers() {
    let rig = Rig::secure();
    let mut one = rig.dataplane_with(hello(1, vec![labelled(1, "a", "agent")]));
    let mut two = rig.dataplane_with(hello(2, vec![labelled(1, "b", "agent")]));
    let mut three = rig.dataplane_with(hello(3, vec![labelled(1, "c", "db")]));
    learn(&one, "api.example.com", [192, 0, 2, 7]);
    learn(&one, "www.example.com", [192, 0, 2, 8]);
    learn(&two, "other.example.net", [192, 0, 2, 7]);
    let (_, id) = one.held(flow("192.0.2.7:443", &["api.example.com"]));
    one.held(flow("192.0.2.7:80", &["api.example.com"]));
    one.held(lookup("mail.example.com", 1));
    two.held(flow("192.0.2.7:443", &["other.example.net"]));
    three.held(flow("192.0.2.7:443", &[]));

    use v1::Scope::{Host, HostPort, Name, NamePort, Subdomains};
    let (a, agents, all) = ("a".to_owned(), "role=agent".to_owned(), "*".to_owned());
    let expected = [
        (NamePort, a.clone(), [1, 1, 1]),
        (NamePort, agents.clone(), [2, 1, 1]),
        (NamePort, all.clone(), [3, 1, 1]),
        (HostPort, a.clone(), [1, 1, 1]),
        (HostPort, agents.clone(), [2, 2, 2]),
        (HostPort, all.clone(), [3, 3, 2]),
        (Host, a.clone(), [1, 2, 1]),
        (Host, agents.clone(), [2, 3, 2]),
        (Host, all.clone(), [3, 4, 2]),
        (Name, a.clone(), [1, 2, 1]),
        (Name, agents.clone(), [2, 2, 1]),
        (Name, all.clone(), [3, 2, 1]),
        (Subdomains, a, [1, 3, 2]),
        (Subdomains, agents, [2, 3, 2]),
        (Subdomains, all, [3, 3, 2]),
    ];
    assert_eq!(reaches(&rig, &id), expected);

    // A yes does what it said: the three requests of this VM below the domain.
    let wide = Reply {
        scope: Some(crate::approval::Scope::Subdomains),
        ..reply(&id, Answer::Approve)
    };
    rig.hub.reply(&wide).unwrap();
    assert_eq!(rig.hub.pending(Which::default()).len(), 2);
    assert!(rig.hub.offers(&id).unwrap().1.is_none(), "it is answered");
}

#[test]
fn what_an_offer_covers_is_asked_once_however_many_selectors_select_the_vm() {
    let rig = Rig::secure();
    let labels = (0..LABELS_OFFERED_MAX).map(|n| (format!("k{n}"), "v".to_owned()));
    let mut dp = rig.dataplane_with(hello(
        1,
        vec![v1::VmUp {
            labels: labels.collect(),
            ..vm_up(1, "web")
        }],
    ));
    let (_, id) = dp.held(flow("192.0.2.7:443", &["api.example.com"]));
    let (_, offers) = rig.hub.offers(&id).unwrap();
    let mut offers = offers.unwrap();
    let (mut asked, mut counted) = (0, 0);
    let covers = |_: &crate::grant::ReadyGrant| {
        asked += 1;
        true
    };
    offers.each(crate::hub::reach::Selected::MAX, covers, |_| counted += 1);
    let scopes = offers.into_messages().len();
    assert_eq!((asked, counted), (scopes, scopes * (LABELS_OFFERED_MAX + 2)));
}

#[test]
fn a_yes_for_a_label_opens_the_vms_that_carry_it_and_no_other() {
    let rig = Rig::secure();
    let mut a = rig.dataplane_with(hello(1, vec![labelled(1, "a", "agent")]));
    let mut b = rig.dataplane_with(hello(2, vec![labelled(1, "b", "agent")]));
    let mut c = rig.dataplane_with(hello(3, vec![labelled(1, "c", "db")]));
    let (_, id) = a.held(flow(WEB, &[]));
    let (held_of_b, _) = b.held(flow(WEB, &[]));
    let (_, of_c) = c.held(flow(WEB, &[]));
    let role = |role: &str| VmSelector::new(None, [("role".to_owned(), role.to_owned())].into());

    let not_the_asker = Reply {
        vms: role("db"),
        ..reply(&id, Answer::Approve)
    };
    let text = rig.hub.reply(&not_the_asker).unwrap_err().to_string();
    assert!(text.contains("role=db does not select VM a"), "{text}");

    let agents = Reply {
        vms: role("agent"),
        scope: Some(crate::approval::Scope::Host),
        ..reply(&id, Answer::Approve)
    };
    let (_, made, ..) = rig.hub.reply(&agents).unwrap();

    let released = verdicts(&b.told());
    assert_eq!(
        (released[0].miss_id, released[0].action, &released[0].grant_id),
        (held_of_b.0, ALLOW, &made.id),
        "what b was held for is answered with it"
    );
    for (open, vm) in [(&mut a, "a"), (&mut b, "b")] {
        assert_eq!(open.verdict(flow("192.0.2.7:80", &[])).action, ALLOW, "{vm}");
    }
    assert_eq!(verdicts(&c.told()), [], "c still waits");
    c.held(flow("192.0.2.7:80", &[]));
    let open: Vec<String> = rig
        .hub
        .pending(Which::default())
        .into_iter()
        .map(|r| r.vm)
        .collect();
    assert_eq!(open, ["c", "c"]);
    assert_eq!(rig.hub.pending_request(&of_c).unwrap().held, 1);

    // A VM that gets the label is opened, one that loses it closed.
    let update = |name, role: &str| VmUpdate {
        name,
        mode: None,
        labels: [("role".to_owned(), role.to_owned())].into(),
        etag: "",
        actor: "tester",
    };
    rig.hub.update_vm(update("b", "db")).unwrap();
    b.told();
    b.held(flow(WEB, &[]));
}

#[test]
fn a_yes_covers_no_guarded_destination_that_it_does_not_name() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let private = |port: u16| match flow(&format!("10.0.0.5:{port}"), &["in.example.com"]) {
        Subject::Flow(flow) => Subject::Flow(FlowSubject {
            guards: GuardSet::EMPTY.with(Guard::PrivateFromDns),
            ..flow
        }),
        lookup => lookup,
    };
    let (_, guarded) = dp.held(private(443));
    let (_, open) = dp.held(flow("192.0.2.7:443", &["in.example.com"]));
    let name = reaches(&rig, &open)
        .into_iter()
        .find(|r| r.0 == v1::Scope::NamePort);
    assert_eq!(name.unwrap().2[1], 1, "not the one behind a guard");
    let itself = reaches(&rig, &guarded);
    assert!(
        itself.iter().all(|r| r.0 == v1::Scope::HostPort && r.2[1] == 1),
        "{itself:?}"
    );
}

#[test]
fn labels_are_offered_up_to_a_limit() {
    let rig = Rig::secure();
    let labels = (0..LABELS_OFFERED_MAX + 3).map(|n| (format!("k{n:02}"), "v".to_owned()));
    let mut dp = rig.dataplane_with(hello(
        1,
        vec![v1::VmUp {
            labels: labels.collect(),
            ..vm_up(1, "web")
        }],
    ));
    let (_, id) = dp.held(lookup("localhost", 1));
    let offered = reaches(&rig, &id);
    assert_eq!(offered.len(), LABELS_OFFERED_MAX + 2, "{offered:?}");
}

#[test]
fn so_many_bindings_are_looked_at() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (_, id) = dp.held(flow("192.0.2.7:443", &[]));
    rig.hub.read(|state, now| {
        let bindings = &mut state.fleet.vms.get_mut("web").unwrap().bindings;
        for n in 0..BINDINGS_COUNTED_MAX + 3 {
            let binding = crate::fleet::Binding {
                addresses: vec!["192.0.2.7".parse().unwrap()],
                expires_at: now.steady + Duration::from_secs(300),
            };
            bindings.insert(format!("n{n}.example.com").parse().unwrap(), binding);
        }
    });
    let itself = reaches(&rig, &id).remove(0);
    assert_eq!(itself.2[2] as usize, BINDINGS_COUNTED_MAX);
}

#[test]
fn flows_of_the_past_are_counted_but_for_those_through_forwards() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (_, id) = dp.held(flow("192.0.2.7:443", &["api.example.com"]));
    let event = |vm: &str, address: &str, port: u32, name: &str, count: u64| v1::Event {
        kind: v1::EventKind::FlowOpened.into(),
        vm: vm.to_owned(),
        tuple: Some(v1::FlowTuple {
            protocol: v1::Protocol::Tcp.into(),
            address: address.to_owned(),
            port,
            ..Default::default()
        }),
        names: vec![name.to_owned()],
        count,
        ..Default::default()
    };
    let through = v1::Event {
        reason: Some(v1::Reason {
            step: "forward".to_owned(),
            ..Default::default()
        }),
        ..event("web", "192.0.2.7", 443, "api.example.com", 0)
    };
    let (_, offers) = rig.hub.offers(&id).unwrap();
    let mut offers = offers.unwrap();
    offers.count_past(&[
        event("web", "192.0.2.7", 443, "api.example.com", 0),
        event("web", "192.0.2.7", 443, "other.example.net", 3),
        event("web", "192.0.2.9", 22, "www.example.com", 0),
        event("gone", "192.0.2.7", 443, "api.example.com", 0),
        event("web", "not an address", 443, "api.example.com", 0),
        through,
    ]);
    let counted: Vec<(v1::Scope, Vec<u64>)> = offers
        .into_messages()
        .iter()
        .map(|o| (o.scope(), o.reaches.iter().map(|r| r.past_flows).collect()))
        .collect();
    let expected = [
        (v1::Scope::NamePort, vec![1, 2]),
        (v1::Scope::HostPort, vec![4, 5]),
        (v1::Scope::Host, vec![4, 5]),
        (v1::Scope::Name, vec![1, 2]),
        (v1::Scope::Subdomains, vec![2, 3]),
    ];
    assert_eq!(counted, expected);
}

#[test]
fn what_parks_is_refused_at_once_and_a_yes_serves_the_next_attempt() {
    let rig = Rig::secure();
    rig.apply(
        "version: 1\nmode: ask\napprovalTimeout: 0\nrules: [{action: allow, domains: [ok.example.com]}]",
    );
    let mut dp = rig.dataplane("web");
    for subject in [flow(WEB, &[]), lookup("example.com", 1)] {
        let refused = dp.verdict(subject.clone());
        assert_eq!((refused.action, refused.once), (DENY, true));
        let reason = refused.reason.unwrap();
        assert_eq!(reason.step, "approval");
        let id = reason.subject;
        let waiting = rig.hub.pending_request(&id).unwrap();
        assert_eq!((waiting.held, waiting.count), (0, 1));
        assert_eq!(waiting.held_until, None);
        dp.verdict(subject.clone());
        assert_eq!(rig.hub.pending_request(&id).unwrap().count, 2, "it joins");
        rig.pass(Duration::from_secs(599));
        assert_eq!(rig.hub.pending(Which::default()).len(), 1);
        rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
        dp.told();
        assert_eq!(dp.verdict(subject).action, ALLOW);
    }
    dp.verdict(flow(WEB, &["late.example.com"]));
    dp.verdict(flow("192.0.2.8:1", &[]));
    rig.pass(Duration::from_secs(600));
    assert_eq!(
        rig.hub.pending(Which::default()).len(),
        0,
        "a parked request has its life, too"
    );
}

#[test]
fn lookups_that_need_no_person_take_their_time_where_nothing_is_held() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let hold = |dp: &mut FakeDataplane| {
        let mut settings = dp.told().into_iter().filter_map(|t| match t {
            Told::VmSettings(settings) => settings.lookup_hold,
            _ => None,
        });
        settings.next_back().map(|hold| (hold.seconds, hold.nanos))
    };
    rig.apply("version: 1\nmode: ask\napprovalTimeout: 1");
    assert_eq!(hold(&mut dp), Some((1, 0)));
    rig.apply("version: 1\nmode: ask\napprovalTimeout: 0");
    assert_eq!(hold(&mut dp), Some((4, 0)));
}

#[tokio::test]
async fn a_no_says_how_many_flows_on_how_many_dataplanes_it_cut() {
    let rig = Rig::open();
    let mut one = rig.dataplane_with(hello(1, vec![vm_up(1, "a")]));
    let mut two = rig.dataplane_with(hello(2, vec![vm_up(1, "b")]));
    let mut three = rig.dataplane_with(hello(3, vec![vm_up(1, "c")]));
    for dp in [&mut one, &mut two] {
        open_allowed(dp, WEB);
        open_allowed(dp, WEB);
    }
    rig.apply("mode: ask\ndefaultAction: deny\nrules: [{action: allow, cidr: 192.0.2.7/32, ports: [443]}]");
    let (_, id) = one.held(flow("192.0.2.7:80", &[]));
    for dp in [&mut one, &mut two, &mut three] {
        let told = dp.told();
        assert!(cuts(&told).is_empty());
        dp.acknowledge(&told);
    }
    let no = Reply {
        scope: Some(crate::approval::Scope::Host),
        vms: Some(VmSelector::all()),
        lifetime: Some(Lifetime::Forever),
        ..reply(&id, Answer::Deny)
    };
    let (_, _, ticket, _) = rig.hub.reply(&no).unwrap();
    for dp in [&mut one, &mut two, &mut three] {
        let told = dp.told();
        dp.acknowledge(&told);
    }
    let report = rig.hub.report(ticket.unwrap()).await;
    assert_eq!(
        (
            report.flows,
            report.dataplanes_cut,
            report.dataplanes_acknowledged
        ),
        (4, 2, 3)
    );
    assert_eq!(report.dataplanes_silent, Vec::<String>::new());
}

#[tokio::test]
async fn closing_a_flow_waits_for_its_dataplane() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    open_allowed(&mut dp, WEB);
    let id = rig.hub.flows(Which::default())[0].1.id.clone();
    let (_, ticket) = rig.hub.close_flow(&id, "tester").unwrap();
    let told = dp.told();
    assert_eq!(cuts(&told), [1]);
    dp.acknowledge(&told);
    let report = rig.hub.report(ticket).await;
    assert_eq!((report.flows, report.dataplanes_cut), (1, 1));
}
