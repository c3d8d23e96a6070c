//! The verdict cache's look-up: as quick with 100,000 verdicts as with one, whatever shapes they have and
//! whatever addresses a guest chose. `cargo bench -p vnet-dataplane --bench cache`.
//!
//! Each round looks up 1,024 flows in turn, so that a full table is met as a guest meets it: cold.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use divan::{Bencher, black_box, counter::ItemsCount};
use vnet_dataplane::engine::Time;
use vnet_dataplane::engine::cache::{Cache, Decision, Standing};
use vnet_proto::model::{
    Epoch, FlowKey, FlowMatch, Match, MissId, NameDemand, PortRange, Protocol, Reason, Verdict,
    VerdictAction, parse_prefix,
};

const EPOCH: Epoch = Epoch {
    incarnation: 1,
    counter: 1,
};
const ROUND: u32 = 1_024;
const SIZES: [u32; 4] = [1, 1_000, 10_000, 100_000];

fn main() {
    divan::main();
}

/// Verdicts for one address and port each, and flows that they cover.
#[divan::bench(args = SIZES)]
fn hit(bencher: Bencher<'_, '_>, entries: u32) {
    let cache = exact(entries, spread);
    look_up(bencher, &cache, |i| spread(i % entries));
}

/// The same, with flows that no verdict covers.
#[divan::bench(args = SIZES)]
fn miss(bencher: Bencher<'_, '_>, entries: u32) {
    let cache = exact(entries, spread);
    look_up(bencher, &cache, |i| Ipv4Addr::from(0xc000_0000 + i));
}

/// Addresses in a row, and such that differ in their highest bits only: what a guest would try.
#[divan::bench(args = SIZES)]
fn hit_adversarial(bencher: Bencher<'_, '_>, entries: u32) {
    let chosen = |i: u32| Ipv4Addr::from(if i.is_multiple_of(2) { i } else { i.reverse_bits() });
    let cache = exact(entries, chosen);
    look_up(bencher, &cache, |i| chosen(i % entries));
}

/// As many shapes of match as there may be, each with its share of the verdicts; the flow is under the last.
#[divan::bench(args = SIZES)]
fn hit_behind_every_shape(bencher: Bencher<'_, '_>, entries: u32) {
    let mut cache = new();
    for i in 0..entries {
        let length = 17 + u8::try_from(i % 7).unwrap_or_default();
        let network = u32::from(spread(i)) & (u32::MAX << (32 - length));
        install(
            &mut cache,
            &format!("{}/{length}", Ipv4Addr::from(network)),
            PortRange::ALL,
        );
    }
    let wanted = Ipv4Addr::new(9, 9, 9, 9);
    install(&mut cache, &wanted.to_string(), PortRange::one(443));
    look_up(bencher, &cache, |_| wanted);
}

fn look_up(bencher: Bencher<'_, '_>, cache: &Cache, address: impl Fn(u32) -> Ipv4Addr) {
    let flows: Vec<FlowKey> = (0..ROUND).map(|i| flow(address(i.wrapping_mul(97)))).collect();
    bencher.counter(ItemsCount::new(ROUND)).bench_local(|| {
        for key in &flows {
            black_box(cache.lookup(Time::ZERO, black_box(key), Standing::default()));
        }
    });
}

fn new() -> Cache {
    let mut cache = Cache::default();
    cache.revoke(EPOCH);
    cache.renew(EPOCH, Duration::from_secs(60));
    cache
}

fn exact(entries: u32, address: impl Fn(u32) -> Ipv4Addr) -> Cache {
    let mut cache = new();
    for i in 0..entries {
        install(&mut cache, &address(i).to_string(), PortRange::one(443));
    }
    cache
}

/// Scattered over the public addresses below 128.0.0.0, none of them twice.
fn spread(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(i.wrapping_mul(0x9e37_79b1) >> 1)
}

fn install(cache: &mut Cache, prefix: &str, ports: PortRange) {
    let Ok(prefix) = parse_prefix(prefix) else { return };
    let verdict = Verdict {
        miss: MissId(1),
        action: VerdictAction::Allow,
        found: Match::Flow(FlowMatch {
            protocol: Protocol::Tcp,
            prefix,
            ports,
            names_consulted: false,
        }),
        epoch: EPOCH,
        expires_in: None,
        once: false,
        budget: None,
        grant: String::new(),
        reason: Reason::default(),
        would_deny: false,
        synthetic_only: false,
        name_demand: NameDemand::Off,
        names: Vec::new(),
    };
    let decision = Arc::new(Decision::new(Time::ZERO, &verdict, Standing::default(), None));
    cache.install(&verdict, &decision, None);
}

fn flow(address: Ipv4Addr) -> FlowKey {
    FlowKey {
        protocol: Protocol::Tcp,
        guest: SocketAddr::from(([192, 168, 127, 2], 40_000)),
        peer: SocketAddr::from((address, 443)),
    }
}
