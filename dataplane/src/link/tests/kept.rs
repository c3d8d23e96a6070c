//! MAC addresses that leases are kept for: whose they are where more than one guest has them.

use super::*;
use crate::network::tests::KEPT;

/// A guest that attaches as is said, with the MAC address that a lease is kept for.
fn guest(rig: &Rig, name: &str, without_kept: bool) -> Stream {
    let (here, there) = UnixStream::pair().unwrap();
    let link = Link::Stream(StreamLink::new(here, StreamKind::Qemu, &[]).unwrap());
    let spec = GuestSpec {
        name: name.to_owned(),
        without_kept,
        ..GuestSpec::default()
    };
    rig.network.attach(link, spec).unwrap();
    Stream::new(there, StreamKind::Qemu)
}

#[test]
fn who_came_by_a_request_has_no_address_that_is_kept_for_a_hypervisors_guest() {
    let mut rig = Rig::new("kept");
    let asker = asker(6);
    assert_eq!(asker.mac, KEPT);
    let mut first = guest(&rig, "web-listen", true);
    first.send(&asker.question());
    rig.dropped("spoofed_mac", 1);

    let mut second = guest(&rig, "web", false);
    asker.is_answered(&mut second);
    first.send(&asker.question());
    rig.dropped("spoofed_mac", 2);

    // Of two that hypervisors brought, the first has it.
    let mut third = guest(&rig, "web-2", false);
    third.send(&asker.question());
    rig.dropped("spoofed_mac", 1);
    asker.is_answered(&mut second);

    // Any other is as good as nobody's.
    let mut other = asker;
    other.mac = Mac([2, 0, 0, 0, 0, 5]);
    other.address = Ipv4Addr::new(192, 168, 127, 5);
    other.is_answered(&mut first);
}
