//! The proof that a match is safe: a second flow inside the first one's match is decided alike.
//!
//! Policies, grants and flows are drawn from small pools, so that they meet often. Guards are laid on
//! as a dataplane does it: by the address really dialled, and on private addresses that names are
//! bound to. A match that consulted names holds for the names that it was made under.
//!
//! What fails is made small before it is told: rules, grants and bindings without which it fails as well go.
//!
//! The ordinary run compares 100,000 pairs. Before a release, many more by hand:
//! `VNET_PAIRS=10000000 cargo test --release -p vnet-controlplane --lib property -- --ignored --nocapture`

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use vnet_proto::model::{Name, NameDemand, PortRange, Subject};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;
use vnet_proto::v1::session_response::Message as Told;

use super::*;
use crate::testing::{FakeDataplane, Rig, cuts, verdicts};

const PAIRS: u32 = 100_000;

/// xorshift64*, seeded: every run draws the same.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

const PREFIXES: [&str; 18] = [
    "0.0.0.0/0",
    "1.0.0.0/8",
    "1.2.0.0/16",
    "1.2.3.0/24",
    "1.2.3.4/32",
    "10.0.0.0/8",
    "10.0.0.0/24",
    "10.0.0.5/32",
    "10.0.0.9/32",
    "127.0.0.0/8",
    "192.168.127.254/32",
    "192.168.127.0/24",
    "169.254.0.0/16",
    "203.0.113.9/32",
    "::/0",
    "2001:db8::/32",
    "fd00::/8",
    "fe80::/10",
];
const ADDRESSES: [&str; 23] = [
    "1.2.3.4",
    "1.2.3.5",
    "1.2.9.9",
    "1.9.9.9",
    "2.2.3.4",
    "10.0.0.5",
    "10.0.0.6",
    "10.0.0.9",
    "10.0.1.1",
    "172.16.0.1",
    "172.99.1.1",
    "192.168.127.254",
    "192.168.127.3",
    "192.168.127.9",
    "169.254.169.254",
    "203.0.113.9",
    "203.0.113.8",
    "2001:db8::1",
    "2001:db9::1",
    "fd12::5",
    "fe80::1",
    "1.1.1.1",
    "2606:4700:4700::1111",
];
const PORTS: [u16; 9] = [1, 22, 53, 80, 443, 444, 853, 8080, 65535];
const RANGES: [&str; 7] = ["22", "53", "80", "443", "80-443", "400-9000", "1-65535"];
const NAMES: [&str; 6] = ["a.test", "x.a.test", "b.test", "y.b.test", "c.test", "dns.google"];
const PATTERNS: [&str; 7] = [
    "a.test",
    "*.a.test",
    "b.test",
    "*.test",
    "y.b.test",
    "dns.google",
    "*.google",
];

/// Destinations that are dialled at others: a private address, and a resolver's.
const NAT: [(&str, &str); 2] = [("1.2.9.9", "10.0.0.5"), ("2.2.3.4", "1.1.1.1")];

fn guarded_and_moved() -> GuardedRanges {
    guarded().with_moved(NAT.map(|(address, _)| address.parse().unwrap()))
}

/// Which names are bound to which address, and so which guards hold where.
struct World {
    bindings: HashMap<IpAddr, Vec<Name>>,
}

impl World {
    fn draw(draw: &mut Draw) -> Self {
        let mut bindings: HashMap<IpAddr, Vec<Name>> = HashMap::new();
        for address in ADDRESSES {
            for _ in 0..draw.below(3) {
                if draw.chance(60) {
                    let name = draw.one(&NAMES).parse().unwrap();
                    bindings.entry(address.parse().unwrap()).or_default().push(name);
                }
            }
        }
        Self { bindings }
    }

    fn flow(&self, protocol: Protocol, address: IpAddr, port: u16) -> FlowSubject {
        let alias: IpAddr = "192.168.127.254".parse().unwrap();
        let host = ["203.0.113.9", "10.0.0.9", "fd12::9"].map(|a| a.parse::<IpAddr>().unwrap());
        let nat = NAT.map(|(from, to)| (from.parse::<IpAddr>().unwrap(), to.parse::<IpAddr>().unwrap()));
        let moved = nat
            .into_iter()
            .find(|(from, _)| *from == address)
            .map(|(_, to)| to);
        let inside = |net: &str| {
            let net = net.parse::<ipnet::IpNet>().unwrap();
            net.contains(&address) || moved.is_some_and(|to| net.contains(&to))
        };
        let names = self.bindings.get(&address).cloned().unwrap_or_default();
        let mut guards = Vec::new();
        if inside("169.254.0.0/16") || inside("fe80::/10") {
            guards.push(Guard::Metadata);
        }
        if address == alias || host.contains(&address) || inside("127.0.0.0/8") || inside("0.0.0.0/8") {
            guards.push(Guard::Host);
            if protocol == Protocol::Tcp && port == 8080 {
                guards.push(Guard::Daemon);
            }
        }
        if address == "192.168.127.3".parse::<IpAddr>().unwrap() {
            guards.push(Guard::Guest);
        }
        let private = [
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "fc00::/7",
            "100.64.0.0/10",
        ];
        if !names.is_empty() && address != alias && private.iter().any(|net| inside(net)) {
            guards.push(Guard::PrivateFromDns);
        }
        let guest = if address.is_ipv4() {
            "192.168.127.2:40000"
        } else {
            "[fd00::2]:40000"
        };
        let port = if protocol.has_ports() { port } else { 0 };
        FlowSubject {
            key: FlowKey {
                protocol,
                guest: guest.parse().unwrap(),
                peer: SocketAddr::new(address, port),
            },
            dialled: if address == alias {
                "127.0.0.1".parse().unwrap()
            } else {
                moved.unwrap_or(address)
            },
            names,
            guards: guards.into_iter().collect(),
            peer_vm: None,
        }
    }
}

fn protocol(draw: &mut Draw, address: IpAddr) -> Protocol {
    let icmp = if address.is_ipv4() {
        Protocol::Icmp
    } else {
        Protocol::Icmpv6
    };
    *draw.one(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, icmp])
}

/// A document in parts, any of which may be left out.
#[derive(Clone)]
struct Drawn {
    head: Vec<String>,
    rules: Vec<String>,
    dns: Vec<String>,
}

impl Drawn {
    fn text(&self) -> String {
        let rules = if self.rules.is_empty() { "" } else { "rules:\n" };
        format!(
            "version: 1\n{}{rules}{}{}",
            self.head.concat(),
            self.rules.concat(),
            self.dns.concat()
        )
    }
}

fn document(draw: &mut Draw) -> String {
    drawn(draw).text()
}

fn drawn(draw: &mut Draw) -> Drawn {
    let (mut head, mut all_rules, mut dns) = (Vec::new(), Vec::new(), Vec::new());
    if draw.chance(80) {
        head.push(format!("defaultAction: {}\n", draw.one(&["allow", "deny"])));
    }
    if draw.chance(30) {
        head.push(format!("mode: {}\n", draw.one(&["enforce", "ask", "observe"])));
    }
    if draw.chance(50) {
        let mut text = format!(
            "guards: {{dns: {}, host: {}",
            draw.one(&["deny", "redirect", "off"]),
            draw.one(&["deny", "off"])
        );
        if draw.chance(50) {
            text += ", resolvers: [\"x.a.test\", \"1.2.9.0/24\", \"2001:db9::1\"]";
        }
        text += "}\n";
        head.push(text);
    }
    if draw.chance(20) {
        head.push("outboundAllow: [\"^x\\\\.a\", \"b.test$\"]\n".to_owned());
    }
    // Long ones have neighbours enough that regions are cut short.
    let (sets, rules) = (draw.chance(50), if draw.chance(5) { 400 } else { draw.below(6) });
    if sets {
        let mut text = format!(
            "sets:\n  s: {{domains: [\"{}\", \"{}\"], cidrs: [\"{}\", \"{}\"]}}\n",
            draw.one(&PATTERNS),
            draw.one(&PATTERNS),
            draw.one(&PREFIXES),
            draw.one(&PREFIXES)
        );
        // More than are entered one by one.
        let many: Vec<String> = (0..70).map(|n| format!("n{n}.many.test")).collect();
        let nets: Vec<String> = (0..70).map(|n| format!("1.2.3.{}/32", 2 * n)).collect();
        text += &format!(
            "  m: {{domains: [\"b.test\", {}], cidrs: [{}]}}\n",
            many.join(", "),
            nets.join(", ")
        );
        head.push(text);
    }
    // Many that rest on names, so that several of them meet at one address.
    let with_names = if draw.chance(30) { 85 } else { 25 };
    for _ in 0..=rules {
        let action = *draw.one(&["allow", "allow", "deny", "drop", "ask"]);
        let mut text = format!("  - {{action: {action}");
        if draw.chance(95 - with_names) {
            let second = if rules > 6 {
                format!("{}.{}.0.0/16", 1 + draw.below(12), draw.below(4))
            } else {
                (*draw.one(&PREFIXES)).to_owned()
            };
            let first = if sets && draw.chance(20) {
                draw.one(&["@s", "@m"])
            } else {
                draw.one(&PREFIXES)
            };
            text += &format!(", cidrs: [\"{first}\", \"{second}\"]");
        }
        if draw.chance(40) {
            text += &format!(", ports: [\"{}\", \"{}\"]", draw.one(&RANGES), draw.one(&RANGES));
        } else if draw.chance(40) {
            text += &format!(
                ", protocol: {}",
                draw.one(&["tcp", "udp", "[tcp, icmp, icmpv6]", "any"])
            );
        }
        if draw.chance(with_names) {
            let name = if sets && draw.chance(40) {
                draw.one(&["@s", "@m"])
            } else {
                draw.one(&PATTERNS)
            };
            text += &format!(", domains: [\"{name}\"]");
            if matches!(action, "allow" | "ask") && draw.chance(20) {
                text += &format!(", sni: {}", draw.one(&["require", "match-if-present", "off"]));
            }
        }
        if draw.chance(15) {
            text += &format!(", vm: {{name: {}}}", draw.one(&["web-1", "other"]));
        }
        if draw.chance(10) {
            text += &format!(
                ", until: {}",
                draw.one(&["2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z"])
            );
        }
        text += "}\n";
        all_rules.push(text);
    }
    if draw.chance(40) {
        let mut text = format!("dns: {{allowedDomains: [\"{}\"]", draw.one(&PATTERNS));
        text += &format!(", blockedDomains: [\"{}\"]}}\n", draw.one(&PATTERNS));
        dns.push(text);
    }
    Drawn {
        head,
        rules: all_rules,
        dns,
    }
}

fn some_grants(draw: &mut Draw) -> VmGrants {
    grants(drawn_grants(draw).iter().map(String::as_str))
}

fn drawn_grants(draw: &mut Draw) -> Vec<String> {
    let mut texts = Vec::new();
    for _ in 0..draw.below(4) {
        let action = draw.one(&["allow", "allow", "deny"]);
        let target = if draw.chance(30) {
            let ports = if draw.chance(50) {
                format!(":{}", draw.one(&RANGES))
            } else {
                String::new()
            };
            format!("domain {}{ports}", draw.one(&PATTERNS))
        } else {
            let prefix = draw.one(&PREFIXES);
            let (address, length) = prefix.split_once('/').unwrap();
            let address = if address.contains(':') {
                format!("[{address}]")
            } else {
                address.to_owned()
            };
            let ports = if draw.chance(50) {
                format!(":{}", draw.one(&RANGES))
            } else {
                String::new()
            };
            format!("{} {address}/{length}{ports}", draw.one(&["tcp", "udp", "any"]))
        };
        texts.push(format!("{action} {target}"));
    }
    texts
}

/// Another flow, most often inside `found`.
fn second(draw: &mut Draw, world: &World, found: &vnet_proto::model::FlowMatch) -> FlowSubject {
    let inside: Vec<IpAddr> = ADDRESSES
        .iter()
        .map(|a| a.parse().unwrap())
        .filter(|a| found.prefix.contains(a))
        .collect();
    let address = if draw.chance(50) {
        *draw.one(&inside)
    } else {
        random_inside(draw, found.prefix)
    };
    let ports: Vec<u16> = PORTS.into_iter().filter(|p| found.ports.contains(*p)).collect();
    let port = if found.ports == PortRange::NONE {
        0
    } else if draw.chance(50) && !ports.is_empty() {
        *draw.one(&ports)
    } else {
        let span = usize::from(found.ports.last() - found.ports.first()) + 1;
        found.ports.first() + u16::try_from(draw.below(span)).unwrap()
    };
    world.flow(found.protocol, address, port)
}

fn random_inside(draw: &mut Draw, prefix: ipnet::IpNet) -> IpAddr {
    match prefix {
        ipnet::IpNet::V4(net) => {
            let bits = u32::from(net.hostmask()) & (draw.next() >> 32) as u32;
            IpAddr::from(std::net::Ipv4Addr::from(u32::from(net.network()) | bits))
        }
        ipnet::IpNet::V6(net) => {
            let random = u128::from(draw.next()) << 64 | u128::from(draw.next());
            let bits = u128::from(net.hostmask()) & random;
            IpAddr::from(std::net::Ipv6Addr::from(u128::from(net.network()) | bits))
        }
    }
}

/// Everything that two decisions are made of.
#[derive(Clone)]
struct Case {
    /// `None`: no policy at all.
    document: Option<Drawn>,
    /// With `--ec2-metadata-access`.
    ec2: bool,
    grants: Vec<String>,
    bindings: Vec<(IpAddr, Name)>,
    peer: Option<Option<Mode>>,
    first: (Protocol, IpAddr, u16),
    /// Inside the match of the first.
    second: (Protocol, IpAddr, u16),
}

/// What is wrong with a case, if something is. One that does not load, or whose second flow is not in the
/// match of the first, is none.
fn wrong(case: &Case) -> Option<String> {
    let text = case.document.as_ref().map(Drawn::text);
    let parsed = match &text {
        Some(text) => Some(Policy::parse("p.yaml", text).ok()?),
        None => None,
    };
    let claimed = parsed.as_ref().map(|policy| PolicyInForce {
        name: "default",
        revision: 3,
        policy,
    });
    let vm = vm();
    let policy = Effective::compose(at(now()), &vm, claimed, None, Modes::default());
    let policy = policy.with_ec2_metadata_access(case.ec2);
    let mut bindings: HashMap<IpAddr, Vec<Name>> = HashMap::new();
    for (address, name) in &case.bindings {
        bindings.entry(*address).or_default().push(name.clone());
    }
    let grants = grants(case.grants.iter().map(String::as_str));
    let context = Context {
        vm: &vm,
        policy: &policy,
        grants: &grants,
        guarded: &guarded_and_moved(),
        peer: case.peer.map(|mode| PeerView { name: "web-2", mode }),
    };
    disagreement(&context, &World { bindings }, case.first, case.second)
}

/// What a cached verdict does to a flow: everything of a decision that outlives the miss.
#[derive(Debug, PartialEq)]
struct Effect {
    outcome: Outcome,
    would_deny: bool,
    name_demand: NameDemand,
    names: Vec<Name>,
    grant: Option<GrantId>,
    expires_at: Option<SystemTime>,
}

fn verdict(decision: &FlowDecision) -> Effect {
    let mut names = decision.names.clone();
    names.sort();
    Effect {
        outcome: decision.outcome,
        would_deny: decision.would_deny,
        name_demand: decision.name_demand,
        names,
        grant: decision.grant.clone(),
        expires_at: decision.expires_at,
    }
}

/// How a flow inside a match is decided otherwise than the one that the match is of, if it is.
fn disagreement(
    context: &Context<'_>,
    world: &World,
    first: (Protocol, IpAddr, u16),
    second: (Protocol, IpAddr, u16),
) -> Option<String> {
    let flow = |(protocol, address, port)| world.flow(protocol, address, port);
    let (first, second) = (flow(first), flow(second));
    let decision = decide_flow(context, &first);
    let found = &decision.found;
    if !found.matches(&second.key) {
        return None;
    }
    let again = decide_flow(context, &second);
    let (cached, fresh) = (verdict(&decision), verdict(&again));
    if cached != fresh {
        return Some(format!(
            "{} of {found} is decided as {} with {cached:?} but {second:?} as {} with {fresh:?}",
            first.key, decision.reason, again.reason
        ));
    }
    // A region that read no name holds whatever is bound, so long as no guard comes of it.
    if !found.names_consulted && second.guards.is_empty() {
        let bound = FlowSubject {
            names: vec!["other.test".parse().unwrap()],
            ..second
        };
        let again = decide_flow(context, &bound);
        if again.outcome != decision.outcome {
            return Some(format!("{found} read names: {bound:?}"));
        }
    }
    None
}

/// The case without whatever it is as wrong without.
fn shrunk(mut case: Case, fails: impl Fn(&Case) -> bool) -> Case {
    fn parts(case: &Case) -> [usize; 5] {
        let document = case.document.as_ref();
        [
            document.map_or(0, |d| d.head.len()),
            document.map_or(0, |d| d.rules.len()),
            document.map_or(0, |d| d.dns.len()),
            case.grants.len(),
            case.bindings.len(),
        ]
    }
    fn without(case: &Case, part: usize, index: usize) -> Case {
        let mut case = case.clone();
        match (part, &mut case.document) {
            (0, Some(document)) => drop(document.head.remove(index)),
            (1, Some(document)) => drop(document.rules.remove(index)),
            (2, Some(document)) => drop(document.dns.remove(index)),
            (3, _) => drop(case.grants.remove(index)),
            (4, _) => drop(case.bindings.remove(index)),
            _ => {}
        }
        case
    }
    loop {
        let counts = parts(&case);
        let candidates = (0..counts.len()).flat_map(|part| (0..counts[part]).map(move |index| (part, index)));
        let smaller = candidates.map(|(part, index)| without(&case, part, index));
        let Some(smaller) = smaller.into_iter().find(|smaller| fails(smaller)) else {
            return case;
        };
        case = smaller;
    }
}

/// Compares so many pairs; says how many matches were wider than an address, and what came out how often.
fn compare(seed: u64, at_least: u64) -> (u64, HashMap<Outcome, u64>) {
    let mut draw = Draw(seed);
    let (vm, guarded) = (vm(), guarded_and_moved());
    let (mut pairs, mut wide) = (0, 0);
    let mut outcomes: HashMap<Outcome, u64> = HashMap::new();
    while pairs < at_least {
        let document = drawn(&mut draw);
        let document = (!draw.chance(10)).then_some(document);
        let ec2 = draw.chance(30);
        let effective = effective(document.as_ref().map(Drawn::text).as_deref(), None);
        let effective = effective.with_ec2_metadata_access(ec2);
        let texts = drawn_grants(&mut draw);
        let grants = grants(texts.iter().map(String::as_str));
        let world = World::draw(&mut draw);
        let peer = draw.chance(80).then(|| {
            *draw.one(&[
                None,
                None,
                Some(Mode::Enforce),
                Some(Mode::Ask),
                Some(Mode::Block),
            ])
        });
        let context = Context {
            vm: &vm,
            policy: &effective,
            grants: &grants,
            guarded: &guarded,
            peer: peer.map(|mode| PeerView { name: "web-2", mode }),
        };
        for _ in 0..20 {
            let address = draw.one(&ADDRESSES).parse().unwrap();
            let first = (protocol(&mut draw, address), address, *draw.one(&PORTS));
            let flow = world.flow(first.0, first.1, first.2);
            let decision = decide_flow(&context, &flow);
            let found = &decision.found;
            assert!(found.matches(&flow.key), "{found} does not cover {}", flow.key);
            assert!(
                !found.names_consulted || found.is_one_address(),
                "{found} rests on names and is wide"
            );
            // What is decided of one guest is never another's, and nothing wide has a guest in it.
            let subnet: ipnet::IpNet = "192.168.127.0/24".parse().unwrap();
            assert!(
                found.is_one_address() || !(found.prefix.contains(&subnet) || subnet.contains(&found.prefix)),
                "{found} reaches guests"
            );
            wide += u64::from(!found.is_one_address());
            *outcomes.entry(decision.outcome).or_default() += 1;
            if decision.outcome == Outcome::Ask {
                assert_eq!(
                    *found.to_string(),
                    flow.key.to_string(),
                    "an ask is never widened"
                );
            }
            for _ in 0..5 {
                let second = second(&mut draw, &world, found).key;
                let second = (second.protocol, second.peer.ip(), second.peer.port());
                if disagreement(&context, &world, first, second).is_some() {
                    let bindings = world.bindings.iter();
                    let case = Case {
                        document: document.clone(),
                        ec2,
                        grants: texts.clone(),
                        bindings: bindings
                            .flat_map(|(address, names)| names.iter().map(|name| (*address, name.clone())))
                            .collect(),
                        peer,
                        first,
                        second,
                    };
                    let case = shrunk(case, |case| wrong(case).is_some());
                    panic!(
                        "{}\n{}\ngrants {:?}\nbindings {:?}, peer {:?}",
                        wrong(&case).unwrap_or_default(),
                        case.document.as_ref().map(Drawn::text).unwrap_or_default(),
                        case.grants,
                        case.bindings,
                        case.peer,
                    );
                }
                pairs += 1;
            }
        }
    }
    (wide, outcomes)
}

/// The same document with something else in it than what it decides for this VM.
fn edited(draw: &mut Draw, document: &Drawn) -> Drawn {
    let mut edited = document.clone();
    let at = draw.below(edited.rules.len());
    let with = |rule: &str, key: &str| format!("{}, {key}}}\n", rule.strip_suffix("}\n").unwrap_or(rule));
    match draw.below(5) {
        0 => edited.rules[at] = with(&edited.rules[at], "comment: another"),
        1 => edited.rules[at] = with(&edited.rules[at], "name: edited"),
        2 => edited
            .head
            .push(format!("approvalTimeout: {}\n", draw.below(600))),
        3 => {
            let action = draw.one(&["allow", "deny", "drop", "ask"]);
            let rule = format!("  - {{action: {action}, vm: {{name: other}}}}\n");
            edited.rules.insert(at, rule);
        }
        _ => edited.head.reverse(),
    }
    edited
}

#[test]
fn t04_an_edit_of_something_else_decides_nothing_otherwise() {
    let mut draw = Draw(0x5eed_1234_abcd_0040);
    let (vm, guarded) = (vm(), guarded_and_moved());
    let mut outcomes: HashMap<Outcome, u64> = HashMap::new();
    for _ in 0..300 {
        let document = drawn(&mut draw);
        let edit = edited(&mut draw, &document);
        let (before, after) = (
            effective(Some(&document.text()), None),
            effective(Some(&edit.text()), None),
        );
        let grants = some_grants(&mut draw);
        let world = World::draw(&mut draw);
        let context = |policy| Context {
            vm: &vm,
            policy,
            grants: &grants,
            guarded: &guarded,
            peer: None,
        };
        for _ in 0..50 {
            let address = draw.one(&ADDRESSES).parse().unwrap();
            let flow = world.flow(protocol(&mut draw, address), address, *draw.one(&PORTS));
            let (was, is) = (
                verdict(&decide_flow(&context(&before), &flow)),
                verdict(&decide_flow(&context(&after), &flow)),
            );
            assert_eq!(was, is, "{flow:?}\n{}\n{}", document.text(), edit.text());
            *outcomes.entry(was.outcome).or_default() += 1;
            let lookup = lookup(draw.one::<&str>(&NAMES));
            let (was, is) = (
                decide_lookup(&context(&before), &lookup),
                decide_lookup(&context(&after), &lookup),
            );
            assert_eq!(
                (was.outcome, was.expires_at),
                (is.outcome, is.expires_at),
                "{lookup:?}"
            );
        }
    }
    for outcome in [Outcome::Allow, Outcome::Deny, Outcome::Drop, Outcome::Ask] {
        assert!(outcomes[&outcome] > 200, "{outcomes:?}");
    }
}

/// What a running server tells a dataplane of a flow: the action and what it rests on, or that a person is asked.
fn told_of(dataplane: &mut FakeDataplane, flow: &FlowSubject) -> (String, Option<v1::Verdict>) {
    let miss = dataplane.miss(Subject::Flow(flow.clone()));
    let told = dataplane.told();
    let Some(verdict) = verdicts(&told).into_iter().find(|v| v.miss_id == miss.0) else {
        let held = |t: &Told| matches!(t, Told::Held(held) if held.miss_id == miss.0);
        assert!(told.iter().any(held), "neither decided nor held: {told:?}");
        // Given up, so that no request waits for room.
        dataplane.say(Message::MissEnded(v1::MissEnded {
            miss_id: miss.0,
            end: v1::MissEnd::GuestGaveUp.into(),
        }));
        return ("asked".to_owned(), None);
    };
    let said = format!(
        "{:?}, demands {:?}, names {:?}",
        verdict.action(),
        verdict.name_demand,
        verdict.names
    );
    (said, Some(verdict))
}

#[test]
fn t04_an_edit_of_something_else_under_a_running_server_decides_nothing_otherwise_and_cuts_nothing() {
    let mut draw = Draw(0x5eed_1234_abcd_0041);
    let rig = Rig::open();
    let mut dataplane = rig.dataplane(&vm().name);
    let (mut opened, mut asked) = (0, 0);
    for _ in 0..150 {
        let document = drawn(&mut draw);
        let edit = loop {
            let edit = edited(&mut draw, &document);
            // Whether anybody is waited for is no small matter.
            if !edit.text().contains("approvalTimeout: 0\n") {
                break edit;
            }
        };
        let world = World::draw(&mut draw);
        let flows = std::iter::repeat_with(|| {
            let address = draw.one(&ADDRESSES).parse().unwrap();
            world.flow(protocol(&mut draw, address), address, *draw.one(&PORTS))
        });
        // Another guest's mode decides as well, and here is no other.
        let flows = flows.filter(|flow| !flow.guards.contains(Guard::Guest));
        let flows: Vec<FlowSubject> = flows.take(12).collect();
        rig.apply(&document.text());
        // Live flows of the document before are cut here, as it may be.
        dataplane.told();
        let mut before = Vec::new();
        let mut live = Vec::new();
        for flow in &flows {
            let (said, verdict) = told_of(&mut dataplane, flow);
            if let Some(verdict) = verdict.filter(|v| v.action() == v1::Action::Allow) {
                live.push(dataplane.open_by(&Subject::Flow(flow.clone()), &verdict));
            }
            asked += u64::from(said == "asked");
            before.push(said);
        }
        opened += live.len();
        rig.apply(&edit.text());
        // Those of documents before are told again until they have ended.
        let mut cut = cuts(&dataplane.told());
        cut.retain(|flow| live.contains(flow));
        assert!(
            cut.is_empty(),
            "{cut:?} of {live:?}\n{}\n{}",
            document.text(),
            edit.text()
        );
        for (flow, was) in flows.iter().zip(before) {
            let (is, _) = told_of(&mut dataplane, flow);
            assert_eq!(was, is, "{flow:?}\n{}\n{}", document.text(), edit.text());
        }
    }
    assert!(opened > 300 && asked > 100, "{opened} opened, {asked} asked");
}

#[test]
fn a_flow_inside_a_match_is_decided_like_the_flow_that_the_match_is_of() {
    let (wide, outcomes) = compare(0x5eed_1234_abcd_0001, PAIRS.into());
    assert!(
        wide > u64::from(PAIRS) / 50,
        "only {wide} matches were wider than an address"
    );
    for outcome in [Outcome::Allow, Outcome::Deny, Outcome::Drop, Outcome::Ask] {
        assert!(outcomes[&outcome] > 200, "{outcomes:?}");
    }
}

#[test]
#[ignore = "by hand, before a release; see the head of this file"]
fn a_flow_inside_a_match_is_decided_like_it_however_many_are_compared() {
    let number = |name: &str, default: u64| {
        let said = std::env::var(name).ok();
        said.map_or(default, |text| {
            text.parse().unwrap_or_else(|_| panic!("{name} is no number"))
        })
    };
    let (pairs, seed) = (
        number("VNET_PAIRS", 10_000_000),
        number("VNET_SEED", 0x5eed_1234_abcd_0004),
    );
    let (wide, outcomes) = compare(seed, pairs);
    println!(
        "{pairs} pairs of seed {seed:#x}: none differs; {wide} matches wider than an address, {outcomes:?}"
    );
}

#[test]
fn what_fails_is_made_small_before_it_is_told() {
    let document = Drawn {
        head: vec!["defaultAction: deny\n".to_owned(), "mode: enforce\n".to_owned()],
        rules: (0..20)
            .map(|n| format!("  - {{action: allow, cidr: 203.0.{n}.0/24}}\n"))
            .collect(),
        dns: vec!["dns: {blockedDomains: [\"*.many.test\"]}\n".to_owned()],
    };
    let case = Case {
        ec2: false,
        document: Some(document),
        grants: vec!["allow tcp 10.0.0.0/8:22".to_owned()],
        bindings: vec![("10.0.0.1".parse().unwrap(), "a.test".parse().unwrap())],
        peer: None,
        first: (Protocol::Tcp, "203.0.7.1".parse().unwrap(), 1),
        second: (Protocol::Tcp, "203.0.7.2".parse().unwrap(), 2),
    };
    assert_eq!(wrong(&case), None, "the evaluator is right about it");
    // As if it failed wherever the seventh rule meets the grant.
    let fails = |case: &Case| {
        let text = case.document.as_ref().map(Drawn::text).unwrap_or_default();
        text.contains("203.0.7.0/24") && !case.grants.is_empty()
    };
    let case = shrunk(case, fails);
    let document = case.document.as_ref().unwrap();
    assert_eq!(document.rules, ["  - {action: allow, cidr: 203.0.7.0/24}\n"]);
    assert!(document.head.is_empty() && document.dns.is_empty() && case.bindings.is_empty());
    assert_eq!(case.grants.len(), 1);
}

/// What the rules answer, one after the other, without any index.
fn first_by_walking<'a>(context: &Context<'a>, flow: &FlowSubject) -> Option<&'a str> {
    let guards: Vec<Guard> = flow
        .guards
        .iter()
        .filter(|guard| {
            *guard != Guard::Guest
                || !(context.policy.is_open() && context.peer.is_some_and(|peer| peer.mode.is_none()))
        })
        .filter(|guard| *guard != Guard::Host || context.policy.settings().host != Some(GuardAction::Off))
        .collect();
    let (peer, port) = (flow.key.peer.ip(), flow.key.peer.port());
    let found = context.policy.rules().find(|rule| {
        let test = &rule.test;
        let refuses = rule.action.refuses();
        let holds = |address: IpAddr| test.prefixes.iter().any(|prefix| prefix.contains(&address));
        let moved = flow.dialled != peer;
        let either = refuses || !guards.is_empty() || moved;
        // Of what is dialled elsewhere the address that is dialled is judged, or the very one that the guest sees.
        let led =
            |prefix: &ipnet::IpNet| *prefix == ipnet::IpNet::from(peer) || prefix.contains(&flow.dialled);
        let named = |prefix: ipnet::IpNet| {
            (prefix.contains(&peer) || prefix.contains(&flow.dialled))
                && context
                    .guarded
                    .names_all(guards.iter().copied().collect(), prefix, peer, flow.dialled)
        };
        test.protocols.contains(flow.key.protocol)
            && (test.ports.is_empty() || test.ports.ranges().iter().any(|range| range.contains(port)))
            && (test.prefixes.is_empty() || holds(peer) || either && holds(flow.dialled))
            && test.names.as_ref().is_none_or(|names| {
                let mut patterns = names.patterns();
                patterns.any(|pattern| flow.names.iter().any(|name| pattern.matches(name)))
                    || names.expressions().is_some() && flow.names.iter().any(|name| names.contains(name))
            })
            && (refuses || opens_dns(context, test, flow))
            && (refuses || guards.is_empty() || test.prefixes.iter().any(named))
            && (!moved
                || refuses
                || !guards.is_empty()
                || test.prefixes.is_empty()
                || test.prefixes.iter().any(|prefix| led(&prefix)))
    });
    found.map(|rule| rule.label.as_str())
}

/// Whether something that allows or asks names the DNS server that a flow leads to, if it does to one.
fn opens_dns(context: &Context<'_>, test: &FlowTest, flow: &FlowSubject) -> bool {
    let Some(resolvers) = &context.policy.resolvers else {
        return true;
    };
    let (peer, port) = (flow.key.peer.ip(), flow.key.peer.port());
    if !flow.key.protocol.has_ports() {
        return true;
    }
    let own = resolvers.names().contains(&"x.a.test".parse().unwrap());
    let known = ["1.1.1.0/30", "2606:4700:4700::/48"]
        .into_iter()
        .chain(
            own.then_some(["1.2.9.0/24", "2001:db9::1/128"])
                .into_iter()
                .flatten(),
        )
        .map(|net| net.parse::<ipnet::IpNet>().unwrap())
        .any(|net| net.contains(&peer) || net.contains(&flow.dialled));
    let by_port = [53, 137, 853, 5353, 5355].contains(&port);
    if !known && !by_port {
        return true;
    }
    let one = test
        .prefixes
        .iter()
        .any(|prefix| prefix == ipnet::IpNet::from(peer) || prefix == ipnet::IpNet::from(flow.dialled));
    let port_named = test
        .ports
        .ranges()
        .iter()
        .any(|r| (r.first(), r.last()) == (port, port));
    let exact = |name: &Name| {
        let known = name.as_str() == "dns.google" || own && name.as_str() == "x.a.test";
        let mut patterns = test.names.iter().flat_map(|names| names.patterns());
        known && patterns.any(|pattern| pattern == vnet_proto::model::NamePattern::Exact(name.clone()))
    };
    one || by_port && port_named || !by_port && flow.names.iter().any(exact)
}

#[test]
fn the_index_finds_the_rule_that_walking_finds() {
    let mut draw = Draw(0x5eed_1234_abcd_0003);
    let (vm, guarded) = (vm(), guarded_and_moved());
    let mut by_rule = 0;
    for _ in 0..2_000 {
        let document = document(&mut draw);
        let effective = effective(Some(&document), None);
        let grants = VmGrants::default();
        let world = World::draw(&mut draw);
        let context = Context {
            vm: &vm,
            policy: &effective,
            grants: &grants,
            guarded: &guarded,
            peer: None,
        };
        for _ in 0..20 {
            let address = draw.one(&ADDRESSES).parse().unwrap();
            let protocol = protocol(&mut draw, address);
            let flow = world.flow(protocol, address, *draw.one(&PORTS));
            if flow.guards.contains(Guard::Daemon) {
                continue;
            }
            let decision = decide_flow(&context, &flow);
            let found = (decision.reason.step == "rule").then_some(decision.reason.subject.as_str());
            assert_eq!(found, first_by_walking(&context, &flow), "{flow:?}\n{document}");
            by_rule += u32::from(found.is_some());
        }
    }
    assert!(by_rule > 10_000, "only {by_rule} flows were decided by a rule");
}

#[test]
fn a_name_inside_a_match_is_decided_like_the_name_that_the_match_is_of() {
    let mut draw = Draw(0x5eed_1234_abcd_0002);
    let (vm, guarded) = (vm(), guarded_and_moved());
    let labels = ["a", "b", "c", "x", "y", "test", "com", "dns"];
    let name = |draw: &mut Draw| -> Name {
        let count = 1 + draw.below(4);
        let text: Vec<&str> = (0..count).map(|_| *draw.one(&labels)).collect();
        format!("{}.{}", text.join("."), draw.one(&["test", "com", "google"]))
            .parse()
            .unwrap()
    };
    let (mut pairs, mut aliases_refused, mut aliases_inside) = (0, 0, 0);
    while pairs < 2 * PAIRS {
        let document = document(&mut draw);
        let effective = effective(Some(&document), None);
        let grants = some_grants(&mut draw);
        let context = Context {
            vm: &vm,
            policy: &effective,
            grants: &grants,
            guarded: &guarded,
            peer: None,
        };
        for _ in 0..20 {
            for alias in [false, true] {
                let subject = |name, query_type| LookupSubject {
                    name,
                    query_type,
                    alias,
                };
                let first = subject(name(&mut draw), 1);
                let decision = decide_lookup(&context, &first);
                assert!(decision.found.matches(&first.name));
                if alias {
                    let expected = as_alias(&context, &first.name);
                    assert_eq!(decision.outcome, expected, "{first:?}\n{document}");
                    aliases_refused += u32::from(expected != Outcome::Allow);
                }
                for _ in 0..10 {
                    let second = subject(name(&mut draw), 28);
                    pairs += 1;
                    if decision.found.matches(&second.name) {
                        let again = decide_lookup(&context, &second);
                        assert_eq!(
                            again.outcome, decision.outcome,
                            "{first:?} {second:?} {}\n{document}",
                            decision.found
                        );
                        aliases_inside += u32::from(alias && first.name != second.name);
                    }
                }
            }
        }
    }
    assert!(
        aliases_refused > 500,
        "only {aliases_refused} aliases were refused"
    );
    assert!(
        aliases_inside > 10_000,
        "only {aliases_inside} aliases lay inside another's match"
    );
}

/// What becomes of an alias, by what becomes of its lookup.
fn as_alias(context: &Context<'_>, name: &Name) -> Outcome {
    let mut region = vnet_proto::model::LookupMatch::Any;
    let answer = crate::policy::eval::lookup_answer(context, name, &mut region);
    let of_resolver = context
        .policy
        .resolvers
        .as_ref()
        .is_some_and(|r| r.names().contains(name));
    match (answer.outcome, answer.reason.step.as_str()) {
        (Outcome::Allow, _) | (Outcome::Ask, "rule") => Outcome::Allow,
        (_, "guard") => Outcome::Deny,
        (_, "default") if of_resolver => Outcome::Deny,
        (_, "default") => Outcome::Allow,
        (outcome, _) => outcome,
    }
}
