//! Tests.
#[test]
fn size() {
    eprintln!("Interface {} Connection {} Flow {}", std::mem::size_of::<smoltcp::iface::Interface>(), std::mem::size_of::<super::Connection>(), std::mem::size_of::<crate::engine::flow::Flow>());
}
