//! What a decision costs: with 10 and with 10,000 ordered rules, and with a thousand and a million names in a
//! list. A decision is made for each miss, of which there may be 5,000 a second.
//!
//! `cargo bench -p vnet-controlplane --bench evaluation`

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::SystemTime;

use divan::{Bencher, black_box};
use vnet_controlplane::clock::Now;
use vnet_controlplane::grant::{VmGrants, VmInstance, VmView};
use vnet_controlplane::policy::{
    Attachment, Attachments, Context, Effective, GuardedRanges, ListCache, Modes, Outcome, Policy,
    PolicyInForce, decide_flow, decide_lookup,
};
use vnet_proto::model::{FlowKey, FlowSubject, LookupSubject, Protocol};

fn main() {
    divan::main();
}

fn vm() -> VmView {
    VmView {
        name: "web".into(),
        labels: BTreeMap::new(),
        instance: VmInstance("boot/1".into()),
    }
}

fn effective(policy: &Policy) -> Effective {
    let now = SystemTime::now();
    let now = Now {
        steady: now,
        wall: now,
    };
    let claimed = PolicyInForce {
        name: "default",
        revision: 1,
        policy,
    };
    Effective::compose(now, &vm(), Some(claimed), None, Modes::default())
}

fn flow(peer: &str, names: &[&str]) -> FlowSubject {
    let peer: std::net::SocketAddr = peer.parse().unwrap();
    FlowSubject {
        key: FlowKey {
            protocol: Protocol::Tcp,
            guest: "192.168.127.2:40000".parse().unwrap(),
            peer,
        },
        dialled: peer.ip(),
        names: names.iter().map(|name| name.parse().unwrap()).collect(),
        guards: Default::default(),
        peer_vm: None,
    }
}

fn decide(bencher: Bencher, policy: &Effective, flow: &FlowSubject, expected: Outcome) {
    let (vm, grants) = (vm(), VmGrants::default());
    let guarded = GuardedRanges::new(["192.168.127.0/24".parse().unwrap()], []);
    let context = Context {
        vm: &vm,
        policy,
        grants: &grants,
        guarded: &guarded,
        peer: None,
    };
    assert_eq!(decide_flow(&context, flow).outcome, expected);
    bencher.bench(|| decide_flow(black_box(&context), black_box(flow)));
}

/// Rules about one /24 and port each, allow and deny in turn.
fn by_prefix(count: usize) -> Effective {
    let mut text = String::from("version: 1\nrules:\n");
    for n in 0..count {
        let action = if n % 2 == 0 { "allow" } else { "deny" };
        let (a, b) = (n / 250, n % 250);
        writeln!(
            text,
            "  - {{action: {action}, cidr: 20.{a}.{b}.0/24, ports: [{}]}}",
            1 + n % 1000
        )
        .unwrap();
    }
    effective(&Policy::parse("bench", &text).unwrap())
}

/// Rules about one name each.
fn by_name(count: usize) -> Effective {
    let mut text = String::from("version: 1\nrules:\n");
    for n in 0..count {
        writeln!(
            text,
            "  - {{action: allow, domains: \"*.site{n}.example\", ports: [443]}}"
        )
        .unwrap();
    }
    effective(&Policy::parse("bench", &text).unwrap())
}

#[divan::bench(args = [10, 10_000])]
fn the_last_of_rules_by_prefix_matches(bencher: Bencher, count: usize) {
    let last = count - 2;
    let peer = format!("20.{}.{}.9:{}", last / 250, last % 250, 1 + last % 1000);
    decide(bencher, &by_prefix(count), &flow(&peer, &[]), Outcome::Allow);
}

#[divan::bench(args = [10, 10_000])]
fn none_of_rules_by_prefix_matches(bencher: Bencher, count: usize) {
    decide(
        bencher,
        &by_prefix(count),
        &flow("8.8.8.8:443", &[]),
        Outcome::Deny,
    );
}

#[divan::bench(args = [10, 10_000])]
fn the_last_of_rules_by_name_matches(bencher: Bencher, count: usize) {
    let name = format!("www.site{}.example", count - 1);
    decide(
        bencher,
        &by_name(count),
        &flow("8.8.8.8:443", &[&name]),
        Outcome::Allow,
    );
}

fn list(names: usize) -> Attachments {
    let mut content = String::with_capacity(names * 24);
    for n in 0..names {
        writeln!(content, "||track{n}.ads{}.example^", n % (names / 4)).unwrap();
    }
    let attachment = Attachment {
        digest: names.to_string(),
        content: content.into_bytes().into(),
    };
    Attachments(BTreeMap::from([("block.txt".to_owned(), attachment)]))
}

const BLOCKING: &str = "version: 1\nsets:\n  block: {file: block.txt, format: adblock}\nrules:\n  \
    - {action: deny, domains: \"@block\"}\n  - {action: allow, cidr: 0.0.0.0/0}\n\
    dns: {defaultAction: allow, blockedDomains: [\"@block\"]}\n";

fn blocking(names: usize) -> Policy {
    Policy::parse_with("bench", BLOCKING, &list(names), &ListCache::default()).unwrap()
}

#[divan::bench(args = [1_000, 1_000_000])]
fn a_flow_with_names_in_lists(bencher: Bencher, names: usize) {
    let policy = effective(&blocking(names));
    decide(
        bencher,
        &policy,
        &flow("8.8.8.8:443", &["www.good.example"]),
        Outcome::Allow,
    );
}

#[divan::bench(args = [1_000, 1_000_000])]
fn a_lookup_with_names_in_lists(bencher: Bencher, names: usize) {
    let policy = effective(&blocking(names));
    let (vm, grants, guarded) = (vm(), VmGrants::default(), GuardedRanges::default());
    let context = Context {
        vm: &vm,
        policy: &policy,
        grants: &grants,
        guarded: &guarded,
        peer: None,
    };
    let lookup = LookupSubject::new("a.track77.ads77.example".parse().unwrap(), 1);
    assert_eq!(decide_lookup(&context, &lookup).outcome, Outcome::Deny);
    bencher.bench(|| decide_lookup(black_box(&context), black_box(&lookup)));
}

#[divan::bench(args = [1_000_000], sample_count = 3, sample_size = 1)]
fn loading_a_list(bencher: Bencher, names: usize) {
    let lists = list(names);
    bencher.bench_local(|| {
        let policy = Policy::parse_with("bench", BLOCKING, &lists, &ListCache::default()).unwrap();
        let rule = &policy.rules.as_slice()[0];
        let tables = rule.test.names.as_ref().unwrap().tables();
        assert_eq!(tables[0].len(), 2 * names);
        tables[0].memory_bytes()
    });
}
