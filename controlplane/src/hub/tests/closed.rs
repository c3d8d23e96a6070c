//! Where dataplanes listen is closed to the guests of the others.

use super::*;

fn listening(boot: u8, at: &[&str]) -> v1::Hello {
    v1::Hello {
        closed_addresses: at.iter().map(ToString::to_string).collect(),
        ..hello(boot, vec![vm_up(1, &format!("vm{boot}"))])
    }
}

/// Attaches, and what Welcome says is closed.
fn welcomed(rig: &Rig, hello: v1::Hello) -> (Attachment, Vec<String>) {
    let mut attachment = rig.hub.attach(hello, "").unwrap();
    match attachment.outbox.try_recv().unwrap().message {
        Some(Told::Welcome(welcome)) => (attachment, welcome.closed_addresses),
        other => panic!("Welcome comes first, not {other:?}"),
    }
}

/// What a dataplane was told since the last look, each time.
fn told(attachment: &mut Attachment) -> Vec<Vec<String>> {
    std::iter::from_fn(|| attachment.outbox.try_recv().ok())
        .filter_map(|response| match response.message {
            Some(Told::ClosedAddresses(closed)) => Some(closed.addresses),
            _ => None,
        })
        .collect()
}

#[test]
fn each_dataplane_is_told_what_the_others_have_closed_until_they_are_gone_for_good() {
    let rig = Rig::open();
    let (mut a, closed) = welcomed(&rig, listening(1, &["127.0.0.1:7001"]));
    assert!(closed.is_empty(), "its own it knows: {closed:?}");

    let b_says = listening(2, &["[::ffff:127.0.0.1]:7002", "0.0.0.0:7003"]);
    let (mut b, closed) = welcomed(&rig, b_says.clone());
    assert_eq!(closed, ["127.0.0.1:7001"]);
    assert_eq!(told(&mut a), [["0.0.0.0:7003", "127.0.0.1:7002"]]);

    // It is lost, and may listen on; it is back, with the same.
    rig.hub.detach(b.key);
    rig.pass(LOST_GRACE / 2);
    let (_, closed) = welcomed(&rig, listening(3, &[]));
    assert_eq!(closed, ["0.0.0.0:7003", "127.0.0.1:7001", "127.0.0.1:7002"]);
    (b, _) = welcomed(&rig, b_says);
    assert!(told(&mut a).is_empty());

    rig.hub.detach(b.key);
    rig.pass(LOST_GRACE / 2);
    assert!(told(&mut a).is_empty());
    rig.pass(LOST_GRACE);
    assert_eq!(told(&mut a), [Vec::<String>::new()]);
}

#[test]
fn one_that_does_not_know_the_message_is_told_by_welcome_alone() {
    let rig = Rig::open();
    let _a = welcomed(&rig, listening(1, &["127.0.0.1:7001"]));
    let older = v1::Hello {
        capabilities: Vec::new(),
        ..listening(2, &[])
    };
    let (mut older, closed) = welcomed(&rig, older);
    assert_eq!(closed, ["127.0.0.1:7001"]);
    let _c = welcomed(&rig, listening(3, &["127.0.0.1:7003"]));
    assert!(told(&mut older).is_empty());
}

#[test]
fn a_hello_that_closes_too_much_or_nobody_knows_what_is_refused_and_says_why() {
    let rig = Rig::open();
    let refused = |at: Vec<&str>| {
        let refused = rig.hub.attach(listening(1, &at), "").err();
        refused.map(|status| status.message().to_owned())
    };
    assert_eq!(
        refused(vec!["127.0.0.1:1"; 65]).as_deref(),
        Some("hello.closed_addresses has 65 entries (at most 64)")
    );
    assert_eq!(
        refused(vec!["localhost:1"]).as_deref(),
        Some("hello.closed_addresses is \"localhost:1\", which does not parse (expected ip:port)")
    );
    assert_eq!(refused(vec!["127.0.0.1:1"; 64]), None);
}
