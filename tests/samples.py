"""Manifests as other tools write them, and how they must be shown.

Each is (name, file name, shown, listed, manifest, fields over IMGAPI, fields over DSAPI,
whether `import --manifest` takes it).  @UUID@, @SHA1@, @SIZE@ and @MD5@ stand for those of the
image, @CJK@ for 17,000 letters, a field with the value None for one that must not be there.
"""

SAMPLES = [
    ('lx-builder', 'image.zfs.gz', True, True,
     '{"v": "2", "name": "ubuntu-20.04", "version": "20211101", "type": "lx-dataset", '
     '"description": "d", "homepage": "https://example.com/image", '
     '"published_at": "2026-11-25T22:25:26Z", "os": "linux", "files": [{"sha1": "@SHA1@", '
     '"size": @SIZE@, "compression": "gzip"}], "requirements": {"networks": [{"name": "net0"'
     ', "description": "d"}], "min_platform": {"7.0": "20210826T002459Z"}, "brand": "lx"}, '
     '"uuid": "@UUID@", "public": false, "owner": "00000000-0000-0000-0000-000000000000", '
     '"tags": {"role": "os", "kernel_version": "4.10.0"}}',
     {'v': 2, 'type': 'lx-dataset', 'public': False}, {}, True),
    ('mibe-owner-empty', 'image.zfs.gz', True, True,
     '{"v": "2", "uuid": "@UUID@", "owner": "", "name": "core-base", "version": "22.4.1", '
     '"state": "active", "disabled": false, "public": false, '
     '"published_at": "2023-02-11T10:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"sha1": "@SHA1@", "size": @SIZE@, "compression": "gzip"}], '
     '"description": "d", "homepage": "https://example.com/image", '
     '"requirements": {"min_ram": 512, "networks": [{"name": "net0", "description": "d"}], '
     '"min_platform": {"7.0": "20151126T062538Z"}}, "users": [{"name": "root"}, '
     '{"name": "admin"}], "generate_passwords": true, "tags": {"role": "proxy", '
     '"lbaas": true}, "billing_tags": ["core"], "urn": "sdc:sdc:core-base:22.4.1"}',
     {'v': 2, 'owner': '00000000-0000-0000-0000-000000000000'}, {}, True),
    ('imagetools', 'image.zfs.gz', True, True,
     '{"v": "2", "name": "minimal-64-trunk", "version": "20181018", "type": "zone-dataset", '
     '"description": "d", "homepage": "https://example.com/image", '
     '"published_at": "2018-10-18T10:21:26Z", "owner": "00000000-0000-0000-0000-000000000000'
     '", "public": "true", "os": "smartos", "urn": "sdc:sdc:minimal-64-trunk:20181018", '
     '"files": [{"compression": "gzip", "sha1": "@SHA1@", "size": @SIZE@}], '
     '"requirements": {"min_platform": {"7.0": "20141030T081701Z"}, '
     '"networks": [{"name": "net0", "description": "d"}]}, "uuid": "@UUID@", '
     '"tags": {"role": "os", "group": "minimal-64-trunk"}}',
     {'v': 2, 'public': True}, {}, True),
    ('sdc-vmmanifest', 'image.zfs.gz', True, True,
     '{"v": "2", "name": "win2008", "version": "1.0.0", "type": "zvol", "cpu_type": "host", '
     '"description": "d", "homepage": "https://example.com/image", '
     '"published_at": "2026-11-25T22:25:26Z", "os": "windows", "image_size": "40960", '
     '"files": [{"sha1": "@SHA1@", "size": @SIZE@, "compression": "gzip"}], '
     '"requirements": {"networks": [{"name": "net0", "description": "d"}], '
     '"ssh_key": true}, "disk_driver": "virtio", "nic_driver": "virtio", "uuid": "@UUID@", '
     '"public": false, "owner": "9dce1460-0c4c-4417-ab8b-25ca478c5a78", '
     '"acl": ["c4513a5b-95ca-46a3-92cd-4f17113b8623", '
     '"c31f59cb-e4f8-4fe4-a0ab-99d4559786af", "5dfa735a-74fa-4f00-9bd6-650309ec07de"], '
     '"urn": "sdc:jpc:win2008:1.0.0"}',
     {'v': 2, 'image_size': 40960, 'public': False}, {}, True),
    ('imgadm-create-version-1.0', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "name": "test1", "version": 1, "public": true, '
     '"owner": "00000000-0000-0000-0000-000000000000", "type": "zone-dataset", '
     '"os": "smartos", "requirements": {"min_platform": {"7.0": "20200603T203505Z"}, '
     '"networks": [{"name": "net0", "description": "d"}]}, '
     '"origin": "e1a0b1ec-c690-11ea-8e16-d3e64a9e7fe3", "files": [{"size": @SIZE@, '
     '"compression": "gzip", "sha1": "@SHA1@"}]}',
     {'version': '1'}, {'version': '1'}, False),
    ('zvol-bare', 'image.zfs', True, True,
     '{"v": 2, "uuid": "@UUID@", "name": "windows-installing", "version": "0.0.1", '
     '"type": "zvol", "os": "windows", "files": [{"sha1": "@SHA1@", "size": @SIZE@, '
     '"compression": "none"}]}',
     {'type': 'zvol', 'nic_driver': None, 'disk_driver': None, 'cpu_type': None,
      'image_size': None},
     {}, True),
    ('zvol-bhyve-no-cpu-type', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "name": "ubuntu-jammy-uefi", "version": "20230601", '
     '"tags": {"internal": false, "resize": true, "deploy": true}, '
     '"published_at": "2023-06-01T10:00:00Z", "os": "linux", "type": "zvol", '
     '"nic_driver": "virtio", "disk_driver": "virtio", "image_size": 10240, '
     '"state": "active", "disabled": false, "description": "d", '
     '"homepage": "https://example.com/image", "requirements": {"brand": "bhyve", '
     '"bootrom": "uefi"}, "files": [{"size": @SIZE@, "compression": "gzip", '
     '"sha1": "@SHA1@"}]}',
     {'nic_driver': 'virtio', 'image_size': 10240, 'cpu_type': None,
      'requirements': {'brand': 'bhyve', 'bootrom': 'uefi'}},
     {}, True),
    ('size-exponent', 'image.zfs.gz', True, True,
     '{"description": "d", "disabled": false, "files": [{"compression": "gzip", '
     '"sha1": "@SHA1@", "size": @SIZE@e+00}], "name": "couchbase-server", "os": "smartos", '
     '"public": false, "requirements": {"networks": [{"description": "d", '
     '"name": "net0"}]}, "state": "active", "type": "zone-dataset", "uuid": "@UUID@", '
     '"v": 2, "version": "4.5.0-snapshot"}',
     {}, {}, True),
    ('homepage-empty', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "name": "odoo", "version": "20230601", '
     '"tags": {"internal": false, "resize": true, "deploy": true}, '
     '"published_at": "2023-06-01T10:00:00Z", "state": "active", "disabled": false, '
     '"description": "", "homepage": "", "type": "lx-dataset", "os": "linux", '
     '"requirements": {"brand": "lx", "networks": [{"name": "net0", "description": "d"}]}, '
     '"files": [{"size": @SIZE@, "compression": "gzip", "sha1": "@SHA1@"}]}',
     {'homepage': None}, {}, True),
    ('disabled-false-text', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": "false", "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}]}',
     {'disabled': False, 'state': 'active'}, {}, False),
    ('acl-text', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": false, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}], '
     '"acl": "91ba0e64-2547-11e2-a972-df579e5fddb3"}',
     {'acl': ['91ba0e64-2547-11e2-a972-df579e5fddb3']}, {}, False),
    ('requirements-null', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}], '
     '"requirements": {"networks": null, "brand": "", "ssh_key": null, "min_ram": null, '
     '"max_ram": 0, "min_platform": null, "bootrom": null}}',
     {}, {}, False),
    ('bom', 'image.zfs.gz', True, True,
     '\ufeff{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}]}',
     {}, {}, False),
    ('duplicate-key', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"os": "smartos", "name": "n", "version": "1", "state": "active", "disabled": false, '
     '"public": true, "published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", '
     '"os": "smartos", "files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}]}',
     {}, {}, False),
    ('published-97Z', 'image.zfs.bz2', True, True,
     '{"v": 2, "uuid": "@UUID@", "name": "mongodb", "version": "1.3.2", "description": "d", '
     '"os": "smartos", "type": "zone-dataset", "urn": "sdc:sdc:mongodb:1.3.2", '
     '"state": "active", "disabled": false, "public": true, '
     '"published_at": "2012-08-31T16:04:51.97Z", "owner": "352971aa-31ba-496c-9ade-a379feaec'
     'd52", "requirements": {"networks": [{"name": "net0", "description": "d"}]}, '
     '"files": [{"md5": "@MD5@", "sha1": "@SHA1@", "size": @SIZE@, "compression": "bzip2"}]}',
     {'published_at': '2012-08-31T16:04:51.970Z'}, {}, True),
    ('mapi', 'fc14-0.1.0.zvol.gz', True, True,
     '{"id": 4, "uuid": "@UUID@", "creator_uuid": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"restricted_to_uuid": null, "name": "fedora14", "version": "0.1.0", "type": "zvol", '
     '"description": "d", "os": "linux", "default": false, "cloud_name": "sdc", '
     '"creator_name": "sdc", "urn": "sdc:sdc:fedora14:0.1.0", "generate_passwords": true, '
     '"inherited_directories": null, "files": [{"path": "fc14-0.1.0.zvol.gz", '
     '"sha1": "@SHA1@", "size": @SIZE@, "url": "https://datasets.example.com/datasets/@UUID@'
     '/fc14-0.1.0.zvol.gz"}], "cpu_type": "host", "nic_driver": "virtio", '
     '"disk_driver": "virtio", "image_size": 10240, "users": {}, '
     '"requirements": {"networks": [{"name": "net0", "description": "d"}], '
     '"ssh_key": true}, "platform_type": "smartos", "published_at": "2011-11-19T00:04:52+00:'
     '00", "created_at": "2012-02-09T23:53:16+00:00", '
     '"updated_at": "2012-02-10T00:05:52+00:00", "imported_at": "2012-02-10T00:05:52+00:00",'
     ' "disabled_at": null, "owner_uuid": null, "vendor_uuid": "352971aa-31ba-496c-9ade-a379'
     'feaecd52", "uri": "/datasets/4"}',
     {'published_at': '2011-11-19T00:04:52Z', 'owner': '352971aa-31ba-496c-9ade-a379feaecd52',
      'users': None},
     {}, True),
    ('dataset-guid-number', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip", '
     '"dataset_guid": 12345678901234567890}]}',
     {}, {}, False),
    ('tags-cjk', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}], '
     '"tags": {"note": "@CJK@"}}',
     {}, {}, False),
    ('copy-beside', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}]}',
     {}, {}, False),
    ('dsapid-zone', 'base64-14.2.0.zfs.gz', True, True,
     '{"uuid": "@UUID@", "provider": "joyent", "owner": "352971aa-31ba-496c-9ade-a379feaecd5'
     '2", "name": "base64", "version": "14.2.0", "description": "d", '
     '"homepage": "https://example.com/image", "urn": "sdc:sdc:base64:14.2.0", '
     '"state": "active", "public": true, "disabled": false, "type": "zone-dataset", '
     '"os": "smartos", "published_at": "2014-07-21T10:43:17Z", '
     '"created_at": "2014-07-21T10:43:17Z", "requirements": {"networks": [{"name": "net0", '
     '"description": "d"}]}, "metadata_info": null, "builder_info": null, '
     '"sync_info": {"source": "https://images.example.com/images"}, '
     '"files": [{"path": "base64-14.2.0.zfs.gz", "size": @SIZE@, "sha1": "@SHA1@", '
     '"md5": "@MD5@", "compression": "gzip"}]}',
     {'owner': '352971aa-31ba-496c-9ade-a379feaecd52'},
     {'creator_uuid': '352971aa-31ba-496c-9ade-a379feaecd52'}, False),
    ('dsapid-nuked', 'old-1.zfs.gz', None, False,
     '{"uuid": "@UUID@", "provider": "community", "owner": "352971aa-31ba-496c-9ade-a379feae'
     'cd52", "name": "old", "version": "1", "description": "d", "state": "nuked", '
     '"public": false, "disabled": false, "type": "zone-dataset", "os": "smartos", '
     '"published_at": "2012-11-30T11:40:03Z", "created_at": "2012-11-30T11:40:03Z", '
     '"requirements": {}, "metadata_info": null, "builder_info": null, "sync_info": null, '
     '"files": [{"path": "old-1.zfs.gz", "size": @SIZE@, "sha1": "@SHA1@", "md5": "", '
     '"compression": "gzip"}]}',
     {}, {}, False),
    ('control-v2', 'image.zfs.bz2', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "riak", "version": "1.8.0", "state": "active", "disabled": false, '
     '"public": true, "published_at": "2013-04-12T15:34:06.924Z", "type": "zone-dataset", '
     '"os": "smartos", "files": [{"sha1": "@SHA1@", "size": @SIZE@, '
     '"compression": "bzip2"}], "description": "d", "urn": "sdc:sdc:riak:1.8.0", '
     '"requirements": {"networks": [{"name": "net0", "description": "d"}]}, '
     '"users": [{"name": "root"}, {"name": "admin"}], "acl": [], "generate_passwords": true}',
     {'v': 2, 'generate_passwords': True, 'users': [{'name': 'root'}, {'name': 'admin'}]},
     {}, True),
    ('control-v1-zvol', 'ubuntu-12.04-2.1.2.zfs.bz2', True, True,
     '{"name": "ubuntu-12.04", "version": "2.1.2", "type": "zvol", "cpu_type": "qemu64", '
     '"description": "d", "created_at": "2012-11-04T00:54:30.673Z", '
     '"updated_at": "2012-11-04T00:54:30.673Z", "os": "linux", "image_size": "16384", '
     '"files": [{"path": "ubuntu-12.04-2.1.2.zfs.bz2", "sha1": "@SHA1@", "size": @SIZE@, '
     '"url": "http://datasets.at/datasets/@UUID@/ubuntu-12.04-2.1.2.zfs.bz2"}], '
     '"requirements": {"networks": [{"name": "net0", "description": "d"}], '
     '"ssh_key": true}, "disk_driver": "virtio", "nic_driver": "virtio", "uuid": "@UUID@", '
     '"creator_uuid": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"vendor_uuid": "352971aa-31ba-496c-9ade-a379feaecd52", "creator_name": "jpc", '
     '"platform_type": "smartos", "cloud_name": "sdc", "urn": "sdc:jpc:ubuntu-12.04:2.1.2", '
     '"published_at": "2012-11-04T00:54:30.673Z"}',
     {'image_size': 16384, 'owner': '352971aa-31ba-496c-9ade-a379feaecd52'},
     {'image_size': '16384', 'creator_name': 'jpc', 'urn': 'sdc:jpc:ubuntu-12.04:2.1.2'}, True),
    ('hidden-zstd', 'image.zfs', False, False,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "zstd"}]}',
     {}, {}, False),
    ('hidden-name-list', 'image.zfs.gz', False, False,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": ["x"], "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}]}',
     {}, {}, False),
    ('hidden-path', 'image.zfs.gz', False, False,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip", "path": "../x"}]}',
     {}, {}, False),
    ('hidden-two-files', 'image.zfs.gz', True, True,
     '{"v": 2, "uuid": "@UUID@", "owner": "352971aa-31ba-496c-9ade-a379feaecd52", '
     '"name": "n", "version": "1", "state": "active", "disabled": false, "public": true, '
     '"published_at": "2020-01-01T00:00:00Z", "type": "zone-dataset", "os": "smartos", '
     '"files": [{"size": @SIZE@, "sha1": "@SHA1@", "compression": "gzip"}, {"size": 2, '
     '"sha1": "0000000000000000000000000000000000000000", "compression": "gzip"}]}',
     {}, {}, False),
]
