"""Make the buckets that are not there yet: the arguments, as the identity of the AWS_ variables."""

import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

deadline = time.monotonic() + 300
client = boto3.client("s3")
for bucket in sys.argv[1:]:
    while True:
        try:
            client.create_bucket(Bucket=bucket)
            break
        except (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            break
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"error: bucket {bucket} can't be made: {error}")
            print(f"waiting for the object store: {error}", flush=True)
            time.sleep(3)
    print(f"bucket {bucket} is there")
