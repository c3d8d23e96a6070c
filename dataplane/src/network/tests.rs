use std::net::IpAddr;

use super::*;
use crate::egress::resolver::{ResolverConfig, Upstreams};
use crate::leases::LeaseConfig;
use crate::metrics::LeaseRefusal;
use crate::zone::Zone;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);
/// The MAC address that 192.168.127.6 is kept for.
pub(crate) const KEPT: Mac = Mac([2, 0, 0, 0, 0, 6]);

/// A network without guests, for tests.
pub(crate) fn network(reports: Sender<Report>) -> Arc<Network> {
    network_of(reports, 1500, Duration::ZERO)
}

/// One with another MTU, and another time for which a guest without a link is kept. It keeps a lease for [`KEPT`].
pub(crate) fn network_of(reports: Sender<Report>, mtu_bytes: u16, grace: Duration) -> Arc<Network> {
    let subnet: Ipv4Net = "192.168.127.0/29".parse().unwrap();
    let lease_time = Duration::from_secs(3600);
    let config = NetworkConfig {
        gateway: GATEWAY,
        gateway_mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
        subnet,
        nat: Arc::default(),
        ipv6: None,
        mtu_bytes: mtu_bytes.into(),
        dhcp: DhcpConfig {
            gateway: GATEWAY,
            subnet,
            dns: vec![GATEWAY],
            mtu_bytes,
            search_domains: Vec::new(),
            lease_time,
        },
        follow_search: None,
        hold: Duration::from_secs(30),
        grace,
        flows_max: 16,
        descriptors: Descriptors::new(8_192),
        metrics: Arc::default(),
    };
    let leases = Leases::new(LeaseConfig {
        subnet,
        reserved: vec![GATEWAY],
        first: None,
        fixed: [(KEPT, Ipv4Addr::new(192, 168, 127, 6))].into(),
        lease_time,
    });
    let resolver = Resolver::new(ResolverConfig {
        upstreams: Upstreams::Fixed(Vec::new()),
        never: Vec::new(),
        in_flight_max: 0,
        total_time: Duration::from_secs(1),
    });
    let guards = Arc::new(Guards::new(crate::guards::HostAddresses::default(), []));
    let runtime = tokio::runtime::Handle::current();
    Network::new(
        config,
        leases,
        Zones::default(),
        guards,
        resolver,
        runtime,
        reports,
    )
}

/// Takes all addresses from a guest.
pub(crate) fn release(network: &Network, vm: VmId) {
    network.lock_leases().release_vm(vm);
}

pub(crate) fn counter(network: &Network, wanted: &str) -> u64 {
    let counters = Surroundings::counters(network);
    counters.iter().find(|(name, _)| *name == wanted).unwrap().1
}

#[tokio::test]
async fn lookups_do_not_wait_for_a_change_of_zones() {
    let (reports, _receiver) = tokio::sync::mpsc::channel(16);
    let network = network(reports);
    let zone = |name: &str| Zone::read(name, [["host", "", "10.0.0.1"]].into_iter(), "").unwrap();
    network.change_zones(|zones| zones.set(zone("a.test"))).unwrap();
    network.change_zones(|zones| {
        zones.set(zone("b.test")).unwrap();
        let (sender, seen) = std::sync::mpsc::channel();
        let other = Arc::clone(&network);
        std::thread::spawn(move || sender.send(Surroundings::zones(&*other).list().len()));
        assert_eq!(
            seen.recv_timeout(Duration::from_secs(5)),
            Ok(1),
            "those that there were"
        );
    });
    assert_eq!(Surroundings::zones(&*network).list().len(), 2);
}

#[tokio::test]
async fn what_guests_share_is_counted_for_all_of_them() {
    let (reports, _receiver) = tokio::sync::mpsc::channel(16);
    let network = network(reports);
    let mac = |n| Mac([2, 0, 0, 0, 0, n]);
    let address = IpAddr::from([192, 168, 127, 2]);
    assert!(network.claim(VmId(1), mac(1), address, Time::ZERO));
    assert!(!network.claim(VmId(2), mac(2), address, Time::ZERO));
    assert_eq!(counter(&network, "network_lease_claim_refused"), 1);
    let address = "fd00::2".parse().unwrap();
    assert!(network.claim(VmId(1), mac(1), address, Time::ZERO));
    assert!(!network.claim(VmId(2), mac(2), address, Time::ZERO));
    assert_eq!(counter(&network, "network_lease_claim_ipv6_refused"), 1);
    assert_eq!(Router::guest_at(&*network, address), Some(VmId(1)));
    let refusals = &network.config.metrics.lease_refusals;
    assert_eq!(
        refusals.of(LeaseRefusal::Claim).get(),
        1,
        "the dataplane's metrics have it too"
    );

    // No room for any question.
    let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x04test\x00\x00\x01\x00\x01";
    let share = network.config.descriptors.attach(VmId(1)).unwrap();
    let descriptor = share.take().descriptor.unwrap();
    network.resolve_for(VmId(1))(7, query.to_vec(), descriptor);
    while counter(&network, "network_resolver_busy") == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(counter(&network, "network_resolver_questions"), 0);
}
